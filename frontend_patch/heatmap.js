// Query x key components at one glance, and the totals by kind.
window.initQkHeatmap = function({data, cgSel, qk}){
  var sel = cgSel.select('.qk-heatmap').html('')

  function render(){
    sel.html('')
    var {table} = qk.state.answer || {}
    if (!table) return
    if (table.grid?.length) renderGrid(table)
    renderBlocks(table)
  }

  function renderGrid(table){
    var nRows = table.grid.length, nColumns = table.grid[0].length
    var cells = table.grid.flatMap((row, i) => row.map((value, j) => ({i, j, value})))
    var max = d3.max(cells, d => Math.abs(d.value)) || 1
    var color = d3.scaleLinear().domain([-max, 0, max]).range([utilQk.color.negative, '#fff', utilQk.color.positive])
    var left = 16, top = 16
    var size = Math.floor(d3.clamp(6, (qk.widthOf('.qk-heatmap') - left - 16)/Math.max(nRows, nColumns, 8), 16))

    sel.append('div.qk-title').append('b').text('Query × key')
    var svg = sel.append('svg.qk-grid')
      .at({
        width: left + nColumns*size + 2,
        height: top + nRows*size + 2,
        role: 'img',
        'aria-label': `terms between the ${nRows} largest query and the ${nColumns} largest key components`,
      })
      .append('g').translate([left, top])
    svg.append('text.qk-axis').at({x: 0, y: -5}).text('key →')
    svg.append('text.qk-axis').at({transform: 'translate(-5,0) rotate(-90)', textAnchor: 'end'}).text('← query')

    var cellSel = svg.appendMany('g', cells).translate(d => [d.j*size, d.i*size])
      .on('mouseenter', (ev, d) => qk.hoverTerm(d))
      .on('mouseleave', () => qk.hoverTerm(null))
    cellSel.append('rect').at({width: size - 1, height: size - 1, fill: d => color(d.value), stroke: '#eee', strokeWidth: .5})
    // signs where they can be read; the smallest cells stay blank
    if (size >= 9) cellSel.filter(d => Math.abs(d.value) > max*.05).append('text')
      .at({x: (size - 1)/2, y: size/2 + 2.5, textAnchor: 'middle', fontSize: 9, fill: d => Math.abs(d.value) > max*.5 ? '#fff' : '#333'})
      .text(d => d.value > 0 ? '+' : '-')
    var markSel = svg.append('g.qk-cross').st({display: 'none'})
    markSel.append('rect.qk-row-mark').at({x: -1, width: nColumns*size + 1, height: size, fill: 'none', stroke: '#000'})
    markSel.append('rect.qk-column-mark').at({y: -1, width: size, height: nRows*size + 1, fill: 'none', stroke: '#000'})

    var noteSel = sel.append('div.qk-note')
    var shown = d3.sum(cells, d => d.value)
    var nDigits = utilQk.digits([max, table.score])
    function note(d){
      if (!d || d.i === undefined || d.j === undefined) {
        return `${nRows} × ${nColumns} largest: ${utilQk.signed(shown, nDigits)} + rest ${utilQk.signed(table.score - shown, nDigits)} = score ${utilQk.signed(table.score, nDigits)}`
      }
      var [query, key] = [[table.query_components[d.i], table.query], [table.key_components[d.j], table.key]].map(nameOf)
      return `${query} × ${key}: ${utilQk.signed(d.value, nDigits)} (${utilQk.percent(d.value, table.score)})`
    }
    noteSel.text(note())

    hover = d => {
      noteSel.text(note(d)).at({title: note(d)})
      markSel.st({display: d ? '' : 'none'})
      var mark = (selector, name, at, n) => markSel.select(selector)
        .st({display: at < n ? '' : 'none'})
        .at({[name]: at < n ? at*size - .5 : null})
      mark('.qk-row-mark', 'y', d?.i, nRows)
      mark('.qk-column-mark', 'x', d?.j, nColumns)
    }
  }
  var hover = () => {}

  function nameOf([component, position]){
    return utilQk.componentLabel(data, component) + (utilQk.isCarried(component, position) ? ` from ${component.position}` : '')
  }

  function renderBlocks(table){
    var blocks = Object.entries(table.blocks).map(([key, value]) => ({kinds: key.split('|'), value}))
    var [rows, columns] = [0, 1].map(i => Object.keys(utilQk.glyphs).filter(kind => blocks.some(d => d.kinds[i] == kind)))
    var nDigits = Math.max(0, utilQk.digits(blocks.map(d => d.value).concat(table.score)) - 1)
    var value = (a, b) => table.blocks[`${a}|${b}`] || 0
    var features = table.blocks['feature|feature']

    sel.append('div.qk-title').append('b').text('By kind')
    var tableSel = sel.append('table.qk-kinds').at({'aria-label': 'block totals: query kinds down, key kinds across'})
    var headSel = tableSel.append('tr')
    headSel.append('th').text('q ↓  k →').at({title: 'query kinds down, key kinds across'})
    headSel.appendMany('th', columns).text(d => utilQk.glyphs[d]).at({title: d => d, 'aria-label': d => d})
    headSel.append('th').text('sum')
    tableSel.appendMany('tr', rows).each(function(a){
      var trSel = d3.select(this)
      trSel.append('th').text(`${utilQk.glyphs[a]} ${a}`)
      trSel.appendMany('td', columns).text(b => utilQk.signed(value(a, b), nDigits))
      trSel.append('td').text(utilQk.signed(d3.sum(columns, b => value(a, b)), nDigits))
    })
    var footSel = tableSel.append('tr')
    footSel.append('th').text('sum')
    footSel.appendMany('td', columns).text(b => utilQk.signed(d3.sum(rows, a => value(a, b)), nDigits))
    footSel.append('td').append('b').text(utilQk.signed(table.score, nDigits))
      .at({'data-qk': 'sum', 'data-of': 'blocks', 'data-value': table.score, 'data-parts': d3.sum(blocks, d => d.value)})
    if (features !== undefined) sel.append('div.qk-note')
      .text(`feature × feature: ${utilQk.signed(features, nDigits)}, ${utilQk.percent(features, table.score)} of the score`)
  }

  qk.fns.table.push(() => {
    hover = () => {}
    render()
  })
  qk.fns.resize.push(render)
  qk.fns.hover.push(d => hover(d))
}

window.init?.()
