// Edges into the clicked node, or from one token to another, with the heads that carried them.
window.initQkEdges = function({visState, renderAll, data, cgSel, qk}){
  var maxRows = 100
  var stripHeads = 8
  var {prompt_tokens} = data.metadata

  var sel = cgSel.select('.qk-edges').html('')
  var titleSel = sel.append('div.qk-title').at({id: 'qk-edges-title'})
  var controlSel = sel.append('div.qk-controls')
  var listSel = sel.append('div.qk-list.qk-edge-list')
    .at({role: 'listbox', 'aria-labelledby': 'qk-edges-title'})

  var modeSel = controlSel.append('select').at({'aria-label': 'which edges'})
    .on('change', function(){ qk.selectTokens(this.value == 'tokens' ? guessTokens() : null) })
  modeSel.appendMany('option', ['node', 'tokens'])
    .at({value: d => d})
    .text(d => ({node: 'into the clicked node', tokens: 'from token to token'})[d])
  var tokensSel = controlSel.append('span.qk-tokens')
  var tokenSels = ['from', 'to'].map((name, i) => {
    if (i) tokensSel.append('span').text(' → ')
    return tokensSel.append('select').at({'aria-label': `${name} token`})
      .on('change', () => qk.selectTokens(tokenSels.map(d => +d.property('value'))))
  })
  tokenSels.forEach(d => d.appendMany('option', d3.range(prompt_tokens.length))
    .at({value: d => d})
    .text(d => utilQk.tokenName(data, d)))
  var filterSel = controlSel.append('input.qk-filter')
    .at({type: 'search', placeholder: 'filter: label, token, L2/17, L1H3', 'aria-label': 'filter edges'})
    .on('input', () => render())
    .on('keydown', ev => ev.key == 'Escape' && filterSel.property('value') ? clearFilter(ev) : null)

  function clearFilter(ev){
    ev.stopPropagation()
    filterSel.property('value', '')
    render()
  }

  // The tokens of the edge in view, or of the strongest cross-position edge
  function guessTokens(){
    var link = qk.state.link || d3.greatest(data.links.filter(d => d.sourceNode.ctx_idx != d.targetNode.ctx_idx), d => d.absWeight)
    return link ? [link.sourceNode.ctx_idx, link.targetNode.ctx_idx] : [0, prompt_tokens.length - 1]
  }

  function searchText({link}){
    var ends = qk.state.tokens ? [link.sourceNode, link.targetNode] : [link.sourceNode]
    var heads = qk.data.isResidual(link) ? link.head_loadings.map(([head]) => utilQk.headName({layer: link.layer, head})) :
      qk.data.cuts(link).flatMap(({cut}) => stripParts(link, cut)).map(d => d.name)
    return ends.flatMap(d => [d.ppClerp, `${d.ctx_idx} “${prompt_tokens[d.ctx_idx]}”`, utilQk.nodeName(d), d.nodeId])
      .concat(heads).join('\n').toLowerCase()
  }

  function render(){
    var {node, tokens} = qk.state
    modeSel.property('value', tokens ? 'tokens' : 'node')
    tokensSel.st({display: tokens ? '' : 'none'})
    tokens?.forEach((d, i) => tokenSels[i].property('value', d))

    titleSel.html('')
    titleSel.append('b').text('Edges ')
    titleSel.append('span').text(
      tokens ? `from ${utilQk.tokenName(data, tokens[0])} to ${utilQk.tokenName(data, tokens[1])}` :
      node ? `into ${utilQk.nodeGlyph(node)} ${utilQk.nodeTitle(data, node)} ${utilQk.nodeLabel(node)} (${utilQk.tokenName(data, node.ctx_idx)})` : '')

    var all = qk.data.edges(qk.state)
    var words = filterSel.property('value').trim().toLowerCase()
    var found = words ? all.filter(d => searchText(d).includes(words)) : all
    var shown = found.slice(0, maxRows)
    qk.shownEdges = shown

    listSel.html('')
    if (!tokens && !node) return listSel.append('div.qk-state')
      .text('Click a node of the graph: its inputs appear here, with the heads that carried them.' + errorText())
    if (!all.length) return listSel.append('div.qk-state').text(tokens ?
      'No edge of this graph runs between these tokens.' : 'This node has no inputs in this graph: tokens and errors are where the graph begins.')
    if (!found.length) return listSel.append('div.qk-state').text('No edge matches the filter.')

    if (!tokens && node.qk_error_share != null) listSel.append('div.qk-group')
      .at({role: 'presentation', 'data-qk': 'error-share', title: 'Of the sum of |edges| into this node, those that this file leaves out included.'})
      .text(`errors are ${utilQk.percent(node.qk_error_share, 1)} of all it reads`)

    var nDigits = utilQk.digits(found.map(d => d.link.weight))
    var maxTotal = d3.max(shown, d => d3.max(stripParts(d.link), e => Math.abs(e.total))) || 1
    d3.groups(shown, d => d.isCross).forEach(([isCross, edges]) => {
      listSel.append('div.qk-group').at({role: 'presentation'})
        .text(isCross ? 'from other positions' : 'at the same position')
      var rowSel = listSel.appendMany('div.qk-row', edges)
        .at({
          role: 'option',
          tabindex: -1,
          'data-qk': 'edge',
          'data-link': d => d.link.linkId,
          'data-source': d => d.link.source,
          'data-target': d => d.link.target,
          'data-value': d => d.link.weight,
        })
        .on('click', (ev, d) => {
          if (ev.metaKey || ev.ctrlKey) return utilCg.togglePinned(visState, renderAll, d.link.sourceNode)
          qk.selectEdge(d.link)
        })
      rowSel.call(qk.examples.attach, d => qk.examples.nodeInfo(d.link.sourceNode))
      rowSel.append('span.qk-glyph').text(d => utilQk.nodeGlyph(d.link.sourceNode))
      if (!tokens) utilQk.addText(rowSel, 'span.qk-token', d => utilQk.tokenName(data, d.link.sourceNode.ctx_idx))
      utilQk.addText(rowSel, 'span.qk-label', d => utilQk.nodeLabel(d.link.sourceNode))
      if (tokens) {
        rowSel.append('span').text('→')
        utilQk.addText(rowSel, 'span.qk-label', d => utilQk.nodeLabel(d.link.targetNode))
      }
      rowSel.append('span.qk-name').text(d => utilQk.nodeName(d.link.sourceNode)).at({title: d => utilQk.nodeTitle(data, d.link.sourceNode)})
      rowSel.call(addStrip, maxTotal)
      rowSel.append('span.qk-value').text(d => utilQk.signed(d.link.weight, nDigits))
    })

    var rest = found.slice(maxRows)
    if (rest.length) listSel.append('div.qk-more')
      .text(`… ${rest.length} smaller edges, together ${utilQk.signed(d3.sum(rest, d => d.link.weight), nDigits)}: filter to see them`)
    markSelected()
  }

  // How much of what reaches the answer begins at errors
  function errorText(){
    var {share, layers} = data.qk?.error_share || {}
    if (share == null) return ''
    var most = layers.slice(0, 3).map(([layer, d]) => `L${layer} ${utilQk.percent(d, 1)}`).join(', ')
    return ` Errors take ${utilQk.percent(share, 1)} of the influence on the answer (most: ${most}).`
  }

  // The heads of an edge that sum to it; of a transcoder link those that delivered it
  function stripParts(link, cut='delivered'){
    return qk.data.parts(link, cut).filter(d => d.kind == 'head')
  }

  // One bar for each of the largest heads, up where positive; all strips share one scale.
  function addStrip(rowSel, max){
    var height = 12
    var y = d => Math.sqrt(Math.abs(d.total)/max)*height/2
    var heads = d => stripParts(d.link).slice(0, stripHeads)
    var svg = rowSel.append('svg.qk-strip').at({width: stripHeads*6, height, role: 'img'})
      .at({'aria-label': d => heads(d).slice(0, 3).map(e => `${e.name} ${utilQk.signed(e.total)}`).join(', ')})
    svg.append('path').at({d: `M0,${height/2}H${stripHeads*6}`, stroke: '#ccc'})
    svg.appendMany('rect', heads).at({
      x: (d, i) => i*6 + 1,
      y: d => d.total > 0 ? height/2 - y(d) : height/2,
      width: 4,
      height: y,
      fill: d => utilQk.colorOf(d.total),
    })
    svg.append('title').text(d => heads(d).map(e => `${e.name} ${utilQk.signed(e.total)}`).join('\n'))
  }

  function markSelected(){
    listSel.selectAll('.qk-row')
      .classed('is-selected', d => d.link == qk.state.link)
      .at({
        'aria-selected': d => d.link == qk.state.link,
        tabindex: (d, i) => d.link == qk.state.link || !qk.state.link && !i ? 0 : -1,
      })
  }

  qk.fns.edges.push(render)
  qk.fns.edge.push(markSelected)
  renderAll.hClerpUpdate.fns.push(() => qk.isStarted && render())
}

window.init?.()
