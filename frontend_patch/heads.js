// What carried the chosen edge: one signed bar a head, and the parts that no head carried.
window.initQkHeads = function({data, cgSel, qk}){
  var sel = cgSel.select('.qk-heads').html('')
  var titleSel = sel.append('div.qk-title').at({id: 'qk-heads-title'})
  sel.append('div.qk-layers')
  window.initQkLayers({cgSel, qk})
  var listSel = sel.append('div.qk-list').at({role: 'listbox', 'aria-labelledby': 'qk-heads-title'})
  var footSel = sel.append('div.qk-foot')
  var shown = null

  // The same parts keep their rows, and so the focus on one of them
  function renderOther(){
    var {link, cut} = qk.state
    if (!shown || shown.link != link || shown.cut !== cut) render()
  }

  function render(){
    var {link, cut} = qk.state
    shown = {link, cut}
    titleSel.html('')
    titleSel.append('b').text('Heads ')
    listSel.html('')
    footSel.html('')
    if (!link) return listSel.append('div.qk-state').text('Choose an edge: the heads that carried it appear here.')

    var {sourceNode, targetNode} = link
    titleSel.append('span')
      .text((cut == 'delivered' ? 'that delivered ' : cut != null ? `of block L${cut}, ` : '') +
        `${utilQk.tokenName(data, sourceNode.ctx_idx)} → ${utilQk.tokenName(data, targetNode.ctx_idx)}` +
        (link.layer == null ? '' : `, through block L${link.layer}`))

    sel.classed('is-narrow', isNarrow()).classed('is-transcoder', isTranscoderShown())
    var parts = qk.data.parts(link, cut)
    var isTranscoder = qk.data.isTranscoder(link)
    if (!isTranscoder && !qk.data.isResidual(link)) return listSel.append('div.qk-state').text('This link has no head loadings.')
    if (isTranscoder) {
      if (cut == null) listSel.append('div.qk-state').text('A same-position edge between neighbours: no attention lies between its ends.')
    } else if (link.layer == null) {
      listSel.append('div.qk-state').text('A logit edge: the logit reads the last residual stream directly, no block and no head lies between.')
    } else if (sourceNode.ctx_idx == targetNode.ctx_idx) {
      listSel.append('div.qk-state').text('A same-position edge: the residual stream and the MLP carry it, and heads that attend to their own position.')
    }

    if (!parts.length) return
    var headerSel = listSel.append('div.qk-columns').at({'aria-hidden': 'true'})
    headerSel.append('span.qk-head-name').text('head')
    headerSel.append('span.qk-value').text('total')
    headerSel.append('span.qk-share').text('(share)')
    headerSel.append('span.qk-bar').st({width: barWidth()}).text('')
    headerSel.append('span.qk-attends').text(isTranscoder ? 'key → query' : 'pattern')

    var max = d3.max(parts, d => Math.max(Math.abs(d.total), Math.abs(directOf(d)), Math.abs(d.total - directOf(d))))
    var nDigits = utilQk.digits(parts.map(d => d.total).concat(link.weight))
    var rowSel = listSel.appendMany('div.qk-row', parts)
      .classed('is-head', d => d.kind == 'head')
      .at({'data-part': d => d.kind, 'data-value': d => d.total, role: d => d.kind == 'head' ? 'option' : 'presentation'})
    rowSel.append('span.qk-head-name').text(d => d.name)
    rowSel.append('span.qk-value').text(d => utilQk.signed(d.total, nDigits))
    rowSel.append('span.qk-share').text(d => `(${utilQk.percent(d.total, link.weight)})`)
    rowSel.call(addBars, max)
    rowSel.filter(d => d.kind == 'head').append('span.qk-attends')
      .text(d => isTranscoder ? pairName(d, link) : d3.format('.3f')(d.pattern))

    rowSel.filter(d => d.kind == 'head')
      .at({
        'data-qk': 'head',
        'data-layer': d => d.layer,
        'data-head': d => d.head,
        tabindex: -1,
        title: d => isTranscoder ? describePairs(d, nDigits) :
          `${d.name} ${utilQk.signed(d.total, nDigits)}: ${utilQk.signed(d.direct, nDigits)} direct, ` +
          `${utilQk.signed(d.total - d.direct, nDigits)} via the block’s MLP; its pattern from query to key is ${d3.format('.3f')(d.pattern)}`,
      })
      .on('click', (ev, d) => qk.selectHead(qk.placeOfPart(link, d)))

    footSel.append('span').text('sum = weight ')
    footSel.append('b').text(utilQk.signed(link.weight, nDigits))
      .at({'data-qk': 'sum', 'data-of': 'heads', 'data-value': link.weight, 'data-parts': d3.sum(parts, d => d.total)})
    if (!isTranscoder && parts.some(d => d.kind == 'head')) {
      footSel.call(addKey, 'direct', false)
      footSel.call(addKey, 'via the MLP', true)
    }
    markSelected()
  }

  // A part that went through no MLP is all direct.
  function directOf(d){
    return d.direct ?? (d.kind == 'head' ? d.total : 0)
  }

  // The largest pair, with dots where others carried more than a tenth of the head's part. A head
  // that delivered wrote at the target; from where is unknown where the file lists no pair.
  function pairName({pairs, total}, link){
    if (!pairs.length) return qk.state.cut == 'delivered' ? `? → ${link.targetNode.ctx_idx}` : ''
    var [query, key, value] = pairs[0]
    return (query == key ? `at ${query}` : `${key} → ${query}`) + (Math.abs(total - value) > Math.abs(total)/10 ? ' …' : '')
  }

  function describePairs(d, nDigits){
    var lines = d.pairs.map(([query, key, value]) =>
      `${utilQk.signed(value, nDigits)} from ${utilQk.tokenName(data, key)} to ${utilQk.tokenName(data, query)}`)
    var note = lines.length ? ', the most of it:' : '; the file does not list from where, a click looks at the edge’s own source'
    return [`${d.name} ${utilQk.signed(d.total, nDigits)}${note}`, ...lines].join('\n')
  }

  // Upper half: the direct part, filled. Lower half: via the MLP, hatched. The line: the total.
  function addBars(rowSel, max){
    var width = barWidth(), height = 14
    var x = value => value/(max || 1)*width/2
    var svg = rowSel.append('svg.qk-bar').at({width, height, 'aria-hidden': 'true'})
    svg.append('path').at({d: `M${width/2},0V${height}`, stroke: '#999'})
    svg.each(function(d){
      var svgSel = d3.select(this)
      var isHead = d.kind == 'head'
      var isSplit = isHead && d.direct != null
      var halves = isSplit ? [d.direct, d.total - d.direct] : [d.total]
      halves.forEach((value, i) => svgSel.append('rect').at({
        x: width/2 + Math.min(0, x(value)),
        y: isSplit ? 1 + i*6 : 3,
        width: Math.abs(x(value)),
        height: isSplit ? 6 : 8,
        fill: i ? `url(#qk-hatch-${value > 0 ? 'positive' : 'negative'})` : isHead ? utilQk.colorOf(value) : '#999',
      }))
      svgSel.append('path').at({
        d: `M${width/2 + x(d.total)},0V${height}`, stroke: '#000', strokeWidth: 1.5,
      })
    })
  }

  function barWidth(){
    return d3.clamp(isTranscoderShown() ? 28 : 40, qk.widthOf('.qk-heads') - (isTranscoderShown() ? isNarrow() ? 206 : 250 : 228), 150)
  }

  // No room for shares: the bars show them
  function isNarrow(){
    return qk.widthOf('.qk-heads') < (isTranscoderShown() ? 310 : 268)
  }

  function isTranscoderShown(){
    return !!qk.state.link && qk.data.isTranscoder(qk.state.link)
  }

  function addKey(sel, text, isHatched){
    var keySel = sel.append('span.qk-key')
    keySel.append('svg').at({width: 14, height: 8}).append('rect')
      .at({width: 14, height: 8, fill: isHatched ? 'url(#qk-hatch-positive)' : utilQk.color.positive})
    keySel.append('span').text(` ${text}`)
  }

  function markSelected(){
    var {place} = qk.state
    var isSelected = d => d.kind == 'head' && place?.layer == d.layer && place?.head == d.head
    var headSel = listSel.selectAll('.qk-row').classed('is-selected', isSelected)
      .filter(d => d.kind == 'head')
    var none = !headSel.filter(isSelected).size()
    headSel.at({'aria-selected': isSelected, tabindex: (d, i) => isSelected(d) || none && !i ? 0 : -1})
    if (listSel.node().contains(document.activeElement)) headSel.filter(isSelected).node()?.focus()
  }

  qk.fns.edge.push(renderOther)
  qk.fns.resize.push(render)
  qk.fns.head.push(markSelected)
}

window.init?.()
