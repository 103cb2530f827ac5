// The head's attention from this query over all its keys: pattern above, score below.
window.initQkAttention = function({data, cgSel, qk}){
  var maxKeys = 120
  var sel = cgSel.select('.qk-attention').html('')

  function render(){
    sel.html('')
    var {place, answer} = qk.state
    var row = answer?.row
    if (!place || !row) return

    var all = row.scores.map((score, key) => ({key, score, pattern: row.pattern[key]}))
    var keys = all
    if (all.length > maxKeys){
      keys = d3.sort(all, d => -d.pattern).slice(0, maxKeys)
      if (!keys.some(d => d.key == place.key)) keys[keys.length - 1] = all[place.key]
      keys = d3.sort(keys, d => d.key)
    }

    var margin = {left: 52, right: 8, top: 2}
    var width = Math.max(200, qk.widthOf('.qk-attention') - margin.left - margin.right - 2)
    var patternHeight = 26, scoreHeight = 22, tokenHeight = 46, gap = 4
    var x = d3.scaleBand(keys.map(d => d.key), [0, Math.min(width, keys.length*46)]).paddingInner(.12)
    var seen = keys.filter(d => d.score !== null)
    var scores = d3.extent(seen.map(d => d.score).concat(0))
    var y = d3.scaleLinear(scores, [scoreHeight, 0])
    var top = patternHeight + gap

    var svg = sel.append('svg.qk-keys')
      .at({
        width: width + margin.left + margin.right,
        height: margin.top + top + scoreHeight + tokenHeight,
        role: 'listbox',
        'aria-label': `attention of ${utilQk.headName(place)} from query ${place.query} over its keys`,
      })
      .append('g').translate([margin.left, margin.top])
    svg.appendMany('text.qk-axis', [['pattern', patternHeight - 8], ['score', top + scoreHeight/2 + 3]])
      .at({x: -6, y: d => d[1], textAnchor: 'end'}).text(d => d[0])

    var keySel = svg.appendMany('g.qk-position', keys)
      .at({
        role: 'option',
        tabindex: d => d.key == place.key ? 0 : -1,
        'data-qk': 'key-position',
        'data-key': d => d.key,
        'data-score': d => d.score,
        'data-pattern': d => d.pattern,
        'aria-selected': d => d.key == place.key,
        'aria-label': d => `key ${utilQk.tokenName(data, d.key)}: ` + describe(d),
      })
      .classed('is-selected', d => d.key == place.key)
      .classed('is-masked', d => d.score === null)
      .translate(d => [x(d.key), 0])
      .on('click', (ev, d) => qk.selectHead({...place, key: d.key}))
    keySel.append('title').text(d => `key ${utilQk.tokenName(data, d.key)}\n${describe(d)}`)

    var w = x.bandwidth()
    keySel.append('rect.qk-ground').at({width: w, height: top + scoreHeight})
    keySel.append('rect').at({
      width: w, height: d => d.pattern*patternHeight, y: d => patternHeight*(1 - d.pattern), fill: '#444',
    })
    keySel.filter(d => d.score !== null).append('rect').at({
      width: w,
      y: d => top + y(Math.max(0, d.score)),
      height: d => Math.max(.5, Math.abs(y(d.score) - y(0))),
      fill: d => utilQk.colorOf(d.score),
      opacity: .75,
    })
    svg.append('path').at({d: `M0,${top + y(0)}H${x.range()[1]}`, stroke: '#999'})
    keySel.append('rect.qk-outline').at({x: -1, y: -1, width: w + 2, height: top + scoreHeight + 2})
    var named = namedKeys(keys, place.key, x)
    keySel.filter(d => named.has(d)).append('text')
      .at({textAnchor: 'end', transform: `translate(${w/2 + 3},${top + scoreHeight + 8}) rotate(-50)`})
      .text(d => shorten(data.metadata.prompt_tokens[d.key] ?? d.key))

    var rest = all.length - keys.length
    if (rest) sel.append('div.qk-more')
      .text(`the ${maxKeys} most attended keys of ${all.length}; the other ${rest} have ${d3.format('.3f')(1 - d3.sum(keys, d => d.pattern))} of the pattern`)
  }

  // The keys whose tokens fit under them: the current one, then by pattern
  function namedKeys(keys, current, x){
    var minGap = 11
    var named = new Set()
    d3.sort(keys, d => d.key == current ? -2 : -d.pattern).forEach(d => {
      if (Array.from(named).every(e => Math.abs(x(e.key) - x(d.key)) >= minGap)) named.add(d)
    })
    return named
  }

  function describe(d){
    return d.score === null ? 'masked, outside this head’s window' :
      `pattern ${d3.format('.4f')(d.pattern)}, score ${utilQk.signed(d.score)}`
  }

  function shorten(token){
    var text = String(token)
    return text.length > 9 ? Array.from(text).slice(0, 8).join('') + '…' : text
  }

  qk.fns.table.push(render)
  qk.fns.resize.push(render)
}

window.init?.()
