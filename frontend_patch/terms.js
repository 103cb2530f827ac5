// Why the head looked there: what each component adds to the score, alone and in pairs.
window.initQkTerms = function({visState, renderAll, data, cgSel, qk}){
  var sel = cgSel.select('.qk-terms').html('')

  function render(){
    sel.html('')
    var {table} = qk.state.answer || {}
    if (!table) return
    sel.classed('is-pairs', qk.state.view == 'pairs')
    qk.state.view == 'pairs' ? renderPairs(table) : ['query', 'key'].forEach(side => renderSide(table, side))
  }

  // Bias, error and position rows stay in view; where errors and tokens of every position are nodes
  // of the graph, they are listed like features.
  function isPinned({component: {kind, label}}){
    if (!qk.data.isTranscoderGraph) return kind != 'feature'
    return kind == 'bias' || kind == 'position' || kind == 'error' && label != 'error'
  }

  // The largest features, and every component that is none
  function renderSide(table, side){
    var maxFeatures = 20
    var all = table[`${side}_components`]
      .map((component, at) => ({component, value: component.marginal, [side == 'query' ? 'i' : 'j']: at}))
    var hidden = new Set(all.filter(d => !isPinned(d)).slice(maxFeatures))
    var shown = all.filter(d => !hidden.has(d))
    var rest = table[`${side}_rest`] + d3.sum(hidden, d => d.value)

    var listSel = addList(`${side[0].toUpperCase() + side.slice(1)} side, at ${utilQk.tokenName(data, table[side])}`,
      `what each component adds to the score, all ${side == 'query' ? 'key' : 'query'} components summed`, utilQk.columns)
    var nDigits = utilQk.digits(shown.map(d => d.value).concat(table.score))
    var rowSel = listSel.appendMany('div.qk-row', shown.filter(d => !isPinned(d)))
    // below the list that scrolls, so that they are always in view
    var otherSel = d3.select(listSel.node().parentNode).append('div.qk-others').at({role: 'listbox', 'aria-label': 'bias, error and embedding'})
      .appendMany('div.qk-row', shown.filter(isPinned))
    ;[rowSel, otherSel].forEach(sel => {
      sel.call(addRow, `${side}-term`).call(addComponent, d => d.component, table[side])
      utilQk.columns.forEach(({name}) => sel.append('span.qk-activation').at({title: name})
        .text(({component}) => component[name] == null ? '' : d3.format('.3~g')(component[name])))
      sel.call(addValue, shown, table, nDigits)
    })
    addFoot(listSel, side, table, rest, shown, nDigits)
  }

  function renderPairs(table){
    var shown = table.terms.map(([i, j, value]) => ({
      i, j, value, query: table.query_components[i], key: table.key_components[j],
    }))
    var listSel = addList('Pairs: query component × key component', 'the largest terms by size; one pair alone can mislead, see the marginals', [])
    var nDigits = utilQk.digits(shown.map(d => d.value).concat(table.score))
    var rowSel = listSel.appendMany('div.qk-row', shown).call(addRow, 'pair-term')
    rowSel.call(addComponent, d => d.query, table.query)
    rowSel.append('span.qk-times').text('×')
    rowSel.call(addComponent, d => d.key, table.key)
    rowSel.call(addValue, shown, table, nDigits)
    addFoot(listSel, 'pairs', table, table.rest, shown, nDigits)
  }

  function addList(title, note, columns){
    var blockSel = sel.append('div.qk-block')
    var titleSel = blockSel.append('div.qk-title.qk-columns').at({title: note})
    titleSel.append('b.qk-label').text(title)
    titleSel.appendMany('span.qk-activation', columns).text(d => d.header).at({title: d => d.name})
    titleSel.append('span.qk-bar')
    titleSel.append('span.qk-value').text('adds')
    titleSel.append('span.qk-share').text('share')
    return blockSel.append('div.qk-list').at({role: 'listbox', 'aria-label': title})
  }

  function addRow(rowSel, kind){
    rowSel
      .at({role: 'option', tabindex: (d, i) => i ? -1 : 0, 'data-qk': kind, 'data-i': d => d.i, 'data-j': d => d.j, 'data-value': d => d.value})
      .on('mouseenter.link', (ev, d) => qk.hoverTerm(d))
      .on('mouseleave.link', () => qk.hoverTerm(null))
      .on('click.test', (ev, d) => d.component && qk.test.choose(d.component, d.i === undefined ? 'key' : 'query'))
  }

  function addComponent(rowSel, toComponent, position){
    rowSel.append('span.qk-glyph').text(d => utilQk.glyphs[toComponent(d).kind]).at({title: d => toComponent(d).kind})
    var info = d => qk.examples.componentInfo(toComponent(d))
    var labelSel = utilQk.addText(rowSel, 'span.qk-label', d => info(d).label)
    labelSel
      .classed('is-node', d => info(d).node)
      .call(qk.examples.attach, info)
      .on('click', (ev, d) => {
        var {node} = info(d)
        if (!node) return
        qk.examples.hide()
        utilCg.clickFeature(visState, renderAll, node, ev.metaKey || ev.ctrlKey)
      })
    // in transcoder graphs attention may have carried a component from an earlier position
    utilQk.addText(rowSel.filter(d => utilQk.isCarried(toComponent(d), position)), 'span.qk-token.qk-from', d => `from ${utilQk.tokenName(data, toComponent(d).position)}`)
    var name = d => utilQk.componentName(data, toComponent(d))
    rowSel.append('span.qk-name').text(name).at({title: d => utilQk.componentTitle(data, toComponent(d)) || null})
      .classed('is-kind', d => name(d) == toComponent(d).kind)
    rowSel.filter(d => utilQk.neuronpedia(data, toComponent(d))).append('a.qk-np').text('↗')
      .at({target: '_blank', rel: 'noopener noreferrer', tabindex: -1})
      .at({href: d => utilQk.neuronpedia(data, toComponent(d)), title: 'this feature on Neuronpedia'})
      .on('click', ev => ev.stopPropagation())
  }

  function addValue(rowSel, rows, table, nDigits){
    rowSel.call(utilQk.addBar, d3.max(rows, d => Math.abs(d.value)))
    rowSel.append('span.qk-value').text(d => utilQk.signed(d.value, nDigits))
    rowSel.append('span.qk-share').text(d => utilQk.percent(d.value, table.score)).at({title: 'share of the score'})
  }

  function addFoot(listSel, of, table, rest, rows, nDigits){
    var shown = d3.sum(rows, d => d.value)
    var footSel = d3.select(listSel.node().parentNode).append('div.qk-foot')
    footSel.append('span').text(`shown ${utilQk.signed(shown, nDigits)} + rest `)
    footSel.append('span').text(utilQk.signed(rest, nDigits)).at({'data-qk': 'rest', 'data-value': rest})
    footSel.append('span').text(' = score ')
    footSel.append('b').text(utilQk.signed(table.score, nDigits))
      .at({'data-qk': 'sum', 'data-of': of, 'data-value': table.score, 'data-parts': shown + rest})
  }

  qk.fns.table.push(render)
  qk.fns.view.push(render)
  qk.fns.hover.push(d => {
    sel.selectAll('.qk-row').classed('is-linked', e => d &&
      (e.i === undefined || e.i == d.i) && (e.j === undefined || e.j == d.j))
  })
}

window.init?.()
