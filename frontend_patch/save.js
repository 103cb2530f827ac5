// Taking results away: the table as CSV and JSON, the head strip as SVG, the line that recomputes it.
window.initQkSave = function({data, cgSel, qk}){
  var sel = cgSel.select('.qk-save').html('')
  // how the graph that circuit-tracer saved gets its heads back
  var explained = 'graph = ctqk.explain_graph(circuit_tracer.Graph.from_pt("graph.pt"), model)'
  var setup = qk.data.isTranscoderGraph ? explained + '\n' : ''
  var pythonSel = sel.append('code.qk-python')
    .at({title: `${setup && `${setup}… `}recomputes this table; click to copy`, tabindex: 0, role: 'button'})
    .on('click', copy)
    .on('keydown', ev => ev.key == 'Enter' ? copy() : null)
  var buttonSel = sel.append('span.qk-buttons').appendMany('button', [
    {name: 'CSV', title: 'the table’s components and terms', isReady: () => qk.state.answer?.table, fn: saveCsv},
    {name: 'JSON', title: 'the table and its attention row', isReady: () => qk.state.answer?.table, fn: saveJson},
    {name: 'SVG', title: 'the heads of this edge', isReady: () => qk.state.link && qk.data.parts(qk.state.link, qk.state.cut).length, fn: saveSvg},
  ])
  buttonSel.text(d => d.name).at({title: d => `Save ${d.title}`, type: 'button'}).on('click', (ev, d) => d.fn())

  function render(){
    var {place} = qk.state
    pythonSel.text(place ? python(place) : '').st({visibility: place ? '' : 'hidden'})
    buttonSel.property('disabled', d => !d.isReady())
  }

  function python({layer, head, query, key}){
    return `graph.qk(layer=${layer}, head=${head}, query=${query}, key=${key})`
  }

  function copy(){
    var text = setup + pythonSel.text()
    navigator.clipboard?.writeText(text).then(() => qk.say('copied'), () => qk.say('the browser does not let pages copy'))
  }

  function saveCsv(){
    var {place, answer: {table}} = qk.state
    var fields = {kind: d => d.kind, checkpoint: d => d.checkpoint, feature: d => d.feature, position: d => d.position}
    utilQk.columns.forEach(({name}) => fields[name] = d => d[name])
    fields = Object.entries({...fields, label: d => d.label, name: d => utilQk.componentName(data, d)})
    var header = ['query', 'key'].flatMap(side => fields.map(([name]) => `${side}_${name}`))
    var cells = component => fields.map(([, fn]) => component ? fn(component) : null)
    var line = (what, value, query, key) => [what, value, ...cells(query), ...cells(key)]
    var lines = [['what', 'value', ...header]]
      .concat(table.terms.map(([i, j, value]) => line('term', value, table.query_components[i], table.key_components[j])))
      .concat([line('rest of terms', table.rest), line('score', table.score)])
      .concat(table.query_components.map(d => line('query marginal', d.marginal, d)))
      .concat([line('rest of query marginals', table.query_rest)])
      .concat(table.key_components.map(d => line('key marginal', d.marginal, null, d)))
      .concat([line('rest of key marginals', table.key_rest)])
    save(d3.csvFormatRows(lines.map(row => row.map(cell))), `${fileName(place)}.csv`, 'text/csv')
  }

  // A label that begins like a formula stays text in a spreadsheet.
  function cell(value){
    return typeof value == 'string' && /^[=+\-@\t\r]/.test(value) ? `'${value}` : value
  }

  function saveJson(){
    var {place, answer: {table, row}} = qk.state
    var document = {slug: data.metadata.slug, prompt: data.metadata.prompt, python: setup + python(place), table, row}
    save(JSON.stringify(document, null, 1), `${fileName(place)}.json`, 'application/json')
  }

  // Drawn anew, so that it stands without the page's styles
  function saveSvg(){
    var {link, cut} = qk.state
    var parts = qk.data.parts(link, cut)
    var nDigits = utilQk.digits(parts.map(d => d.total))
    var max = d3.max(parts, d => Math.abs(d.total)) || 1
    var rowHeight = 18, barWidth = 220, left = 120, width = left + barWidth + 150
    var svg = d3.create('svg').at({
      xmlns: 'http://www.w3.org/2000/svg',
      width,
      height: (parts.length + 2)*rowHeight + 10,
      fontFamily: 'system-ui, sans-serif',
      fontSize: 11,
    })
    svg.append('rect').at({width: '100%', height: '100%', fill: '#fff'})
    svg.append('text').at({x: 8, y: 16, fontWeight: 'bold'})
      .text(`${utilQk.nodeLabel(link.sourceNode)} (${utilQk.tokenName(data, link.sourceNode.ctx_idx)}) → ` +
        `${utilQk.nodeLabel(link.targetNode)} (${utilQk.tokenName(data, link.targetNode.ctx_idx)})` +
        (cut == null ? '' : cut == 'delivered' ? ', by the heads that delivered it' : `, at block L${cut}`))
    var x = value => value/max*barWidth/2
    var rowSel = svg.appendMany('g', parts).translate((d, i) => [0, (i + 1)*rowHeight + 8])
    rowSel.append('text').at({x: left - 8, y: 12, textAnchor: 'end'}).text(d => d.name)
    rowSel.append('rect').at({
      x: d => left + barWidth/2 + Math.min(0, x(d.total)),
      y: 3,
      width: d => Math.abs(x(d.total)),
      height: 11,
      fill: d => utilQk.colorOf(d.total),
    })
    rowSel.append('text').at({x: left + barWidth + 8, y: 12})
      .text(d => `${utilQk.signed(d.total, nDigits)} (${utilQk.percent(d.total, link.weight)})`)
    svg.append('path').at({d: `M${left + barWidth/2},${rowHeight + 6}v${parts.length*rowHeight}`, stroke: '#666'})
    svg.append('text').at({x: left + barWidth + 8, y: (parts.length + 1)*rowHeight + 20, fontWeight: 'bold'})
      .text(`${utilQk.signed(link.weight, nDigits)} = edge weight`)
    save(new XMLSerializer().serializeToString(svg.node()), `${data.metadata.slug}-heads.svg`, 'image/svg+xml')
  }

  function fileName(place){
    return `${data.metadata.slug}-${utilQk.placeName(place).replaceAll(':', '-')}`
  }

  function save(text, name, type){
    var url = URL.createObjectURL(new Blob([text], {type: `${type};charset=utf-8`}))
    d3.create('a').at({href: url, download: name}).node().click()
    setTimeout(() => URL.revokeObjectURL(url), 1000)
    qk.say(`saved ${name}`)
  }

  qk.fns.edge.push(render)
  qk.fns.head.push(render)
  qk.fns.table.push(render)
}

window.init?.()
