// Numbers, names and colours of the panel. Every number is signed, so colour never carries the sign alone.
window.utilQk = (function(){
  var glyphs = {feature: '●', bias: '▬', error: '◆', embedding: '■', position: '▲'}

  // The columns of numbers in a table's lists, as COLUMNS in attribution/columns.py has them: name in
  // the file and in the CSV, header on the page.
  var columns = [{name: 'activation', header: 'act.'}]

  // Decimals with which every number of a list is written, so that what is seen adds up.
  function digits(values){
    var max = d3.max(values, d => Math.abs(d)) || 1
    return d3.clamp(0, 4 - Math.floor(Math.log10(max)), 6)
  }

  function signed(value, nDigits=3){
    var str = Math.abs(value).toFixed(nDigits)
    return (value < 0 && +str != 0 ? '-' : '+') + str
  }

  // A share may exceed 100 % or be negative: parts cancel.
  function percent(part, whole){
    var share = part/whole*100
    if (!isFinite(share)) return ''
    return (Math.abs(share) < 9999 ? share.toFixed(0) : share.toExponential(1)).replace(/^-0$/, '0') + ' %'
  }

  function headName({layer, head}){
    return `L${layer}H${head}`
  }

  function placeName({layer, head, query, key}){
    return `${headName({layer, head})}:q${query}:k${key}`
  }

  function parsePlace(str){
    var match = /^\s*L(\d+)H(\d+):q(\d+):k(\d+)\s*$/i.exec(str || '')
    if (!match) return null
    var [layer, head, query, key] = match.slice(1).map(d => +d)
    return {layer, head, query, key}
  }

  // Text of other people's inside a sentence of ours: right-to-left text stays in its place.
  function isolate(text){
    return `\u2068${text}\u2069`
  }

  // " Aunt" at 14 as 14 “ Aunt”; the quotes show where the token begins and ends.
  function tokenName(data, position){
    var token = data.metadata.prompt_tokens[position]
    return token === undefined ? `${position}` : `${position} “${isolate(token)}”`
  }

  // As base/feature_names.py: features are named by the layer whose output they read.
  function featureName({checkpoint, feature}){
    return `${checkpoint ? `L${checkpoint - 1}` : 'in'}/${feature}`
  }

  // What titles say of a feature beside its name, where its dictionary was trained at resid_pre of
  // the next block: the same stream by another name
  function hookNote(data, checkpoint){
    return data.qk?.feature_hook == 'resid_pre' ? `= resid_pre of block ${checkpoint}` : ''
  }

  // A feature's name with that note, "" for what is no feature
  function componentTitle(data, component){
    return component.kind == 'feature' ? `${featureName(component)} ${hookNote(data, component.checkpoint)}`.trim() : ''
  }

  function nodeTitle(data, node){
    if (node.feature_type != 'cross layer transcoder') return nodeName(node)
    return `${nodeName(node)} ${hookNote(data, +node.layer + 1)}`.trim()
  }

  // An error of a transcoder graph is one layer's; the layer's name tells several apart.
  function componentName(data, {kind, label, checkpoint, feature}){
    if (kind == 'feature') return featureName({checkpoint, feature})
    return data.qk?.graph_kind == 'transcoder' && label == 'error' ? `L${checkpoint - 1} error` : kind
  }

  // Where a feature is on Neuronpedia; undefined where its dictionary is not.
  function neuronpedia(data, {kind, checkpoint, feature}){
    var id = data.qk?.neuronpedia?.[checkpoint]
    if (kind == 'feature' && id) return `https://www.neuronpedia.org/${id.split('/').map(encodeURIComponent).join('/')}/${feature}`
  }

  // Whether attention carried a component from another position, which its row then names. The
  // label of an error names its position already.
  function isCarried({kind, label, position}, to){
    return position != to && !(kind == 'error' && label == 'error')
  }

  function nodeName(node){
    if (node.feature_type != 'cross layer transcoder') return utilCg.layerLocationLabel(node.layer, node.probe_location_idx)
    return `L${node.layer}/${util.cantorUnpair(node.feature)[1]}`
  }

  function nodeLabel(node){
    return isolate(node.ppClerp || '(no label)')
  }

  function nodeGlyph(node){
    return utilCg.featureTypeToText(node.feature_type)
  }

  function componentLabel(data, component){
    if (component.kind == 'error' && component.label == 'error') return `error: ${tokenName(data, component.position)}`
    if (component.kind == 'error') return component.label
    if (component.kind == 'bias') return `bias ${component.label}`
    return isolate(component.label || '(no label)')
  }

  var color = {positive: '#1b7837', negative: '#762a83', none: '#bbb'}

  function colorOf(value){
    return value > 0 ? color.positive : value < 0 ? color.negative : color.none
  }

  // A bar to the right of a middle line where positive, to its left where negative.
  function addBar(sel, max, {width=44, height=9}={}){
    var x = d => d.value/(max || 1)*width/2
    var svg = sel.append('svg.qk-bar').at({width, height, 'aria-hidden': 'true'})
    svg.append('path').at({d: `M${width/2},0V${height}`, stroke: '#999'})
    svg.append('rect').at({
      x: d => width/2 + Math.min(0, x(d)),
      y: 1,
      width: d => Math.abs(x(d)),
      height: height - 2,
      fill: d => colorOf(d.value),
    })
    return svg
  }

  // Text that the style may cut off, whole in its title
  function addText(sel, tag, textFn){
    return sel.append(tag).at({title: textFn}).text(textFn)
  }

  return {
    glyphs,
    columns,
    digits,
    signed,
    percent,
    headName,
    placeName,
    parsePlace,
    isolate,
    tokenName,
    featureName,
    componentName,
    componentTitle,
    neuronpedia,
    isCarried,
    nodeName,
    nodeTitle,
    nodeLabel,
    nodeGlyph,
    componentLabel,
    color,
    colorOf,
    addBar,
    addText,
  }
})()

window.init?.()
