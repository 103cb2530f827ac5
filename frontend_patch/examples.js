// A card with a feature's examples beside the panel, for features in the graph and outside it.
window.initQkExamples = function({visState, renderAll, data, qk}){
  var cardSel = d3.select('body').selectAppend('div.qk-card').html('')
    .at({role: 'tooltip', id: 'qk-card'}).classed('is-open', false)
  var headSel = cardSel.append('div.qk-card-head')
  var noteSel = cardSel.append('div.qk-card-note')
  var examplesSel = cardSel.append('div.qk-card-examples')
  var featureExamples = window.initFeatureExamples({containerSel: examplesSel, showLogits: true})
  var timer = null

  var isTranscoder = qk.data.isTranscoderGraph
  var notes = {
    bias: isTranscoder ? 'Biases of every earlier block and position, carried here: no nodes of the graph.' :
      'The decoder bias of the dictionary: the same at every position and for every prompt.',
    error: isTranscoder ? 'What the transcoder does not explain of the MLP’s output at its position.' :
      'What the dictionary does not explain of the residual stream at this position.',
    'unselected features': 'All active features that are not in the graph (--max_feature_nodes), together.',
    'MLP where features are dropped': 'What the MLP writes at the positions where circuit-tracer drops all features, the first above all.',
    embedding: 'The token’s embedding.',
    position: 'The learned embedding of this position.',
  }

  function show(element, d){
    headSel.html('')
    headSel.append('span.qk-glyph').text(d.glyph)
    utilQk.addText(headSel, 'b', () => d.label)
    headSel.append('div').text([
      d.name,
      d.activation == null ? '' : `activation ${d3.format('.4~g')(d.activation)}`,
      `at ${utilQk.tokenName(data, d.position)}`,
      d.node ? '' : 'not a node of this graph',
    ].filter(d => d).join(' · '))

    noteSel.text(notes[d.label] || notes[d.kind] || (d.id === undefined ? 'No examples are stored for this feature.' : ''))
    examplesSel.st({display: d.id === undefined ? 'none' : ''})
    if (d.id !== undefined) {
      var {scan, transcoder_list} = data.metadata
      featureExamples.renderFeature(scan?.startsWith('custom-') ? transcoder_list[d.layer] : scan || '', d.id)
    }
    place(element)
    cardSel.classed('is-open', true)
  }

  // Left of the panel if there is room, else below the row
  function place(element){
    var panel = element.closest('.qk-panel').getBoundingClientRect()
    var row = element.getBoundingClientRect()
    var width = Math.min(460, Math.max(280, panel.left - 30))
    var isBeside = panel.left > 310
    cardSel.st({
      width,
      left: isBeside ? panel.left - width - 12 : d3.clamp(8, row.left, window.innerWidth - width - 8),
      top: isBeside ? d3.clamp(8, row.top - 40, Math.max(8, window.innerHeight*.45)) : row.bottom + 6,
      maxHeight: window.innerHeight*.5,
    })
  }

  function hide(){
    clearTimeout(timer)
    cardSel.classed('is-open', false)
  }

  function isOpen(){
    return cardSel.classed('is-open')
  }

  // Hover shows, click goes to the node, ctrl-click pins it, as elsewhere on the page.
  function attach(sel, toInfo){
    sel
      .on('mouseenter.card', function(ev, d){
        if (ev.shiftKey) return
        clearTimeout(timer)
        timer = setTimeout(() => show(this, toInfo(d)), 150)
        var {node} = toInfo(d)
        if (node) utilCg.hoverFeature(visState, renderAll, node)
      })
      .on('mouseleave.card', (ev, d) => {
        if (ev.shiftKey) return
        hide()
        if (toInfo(d).node) utilCg.unHoverFeature(visState, renderAll)
      })
  }

  function componentInfo(d){
    var node = qk.data.nodeOf(d)
    return {
      kind: d.kind,
      node,
      glyph: utilQk.glyphs[d.kind],
      label: node && d.kind != 'error' ? utilQk.nodeLabel(node) : utilQk.componentLabel(data, d),
      name: utilQk.componentTitle(data, d) || utilQk.componentName(data, d),
      activation: d.activation,
      position: d.position,
      layer: d.checkpoint - 1,
      id: d.id,
    }
  }

  function nodeInfo(node){
    var isFeature = node.feature_type == 'cross layer transcoder'
    return {
      kind: node.isError ? 'error' : node.feature_type,
      node,
      glyph: utilQk.nodeGlyph(node),
      label: utilQk.nodeLabel(node),
      name: isFeature ? utilQk.nodeTitle(data, node) : '',
      activation: node.activation,
      position: node.ctx_idx,
      layer: node.layer,
      id: isFeature ? node.feature : undefined,
    }
  }

  return {attach, hide, isOpen, componentInfo, nodeInfo}
}

window.init?.()
