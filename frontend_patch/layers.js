// Which blocks carried an edge of a transcoder graph: one cell a block, and the heads that delivered.
window.initQkLayers = function({cgSel, qk}){
  var sel = cgSel.select('.qk-layers').html('')
  var shownLink = null

  // The same link keeps its cells, and so the focus on one of them
  function render(){
    var {link} = qk.state
    if (link && link == shownLink) return markSelected()
    shownLink = link
    var cuts = link ? qk.data.cuts(link) : []
    sel.html('').st({display: cuts.length ? '' : 'none'})
    if (!cuts.length) return

    var nDigits = utilQk.digits([link.weight]) - 1
    var max = d3.max(cuts, d => Math.abs(d.total)/Math.max(1e-30, link.absWeight)) || 1
    max = Math.max(1, max)*link.absWeight // a full bar is at least the whole edge
    var listSel = sel.append('div.qk-cuts')
      .at({role: 'listbox', 'aria-label': 'blocks that the edge crosses', 'aria-orientation': 'horizontal'})
    var cutSel = listSel.appendMany('div.qk-cut', cuts)
      .at({
        role: 'option',
        'data-qk': 'layer',
        'data-layer': d => d.cut,
        'data-value': d => d.total,
        title: d => describe(d, link, nDigits),
      })
      .on('click', (ev, d) => qk.selectCut(d.cut))
    cutSel.append('span.qk-cut-name').text(d => d.name)
    cutSel.append('span').call(addBar, max)
    cutSel.append('span.qk-share').text(d => utilQk.percent(d.total, link.weight))
    sel.append('div.qk-more')
    markSelected()
  }

  function describe({cut, total}, link, nDigits){
    var value = utilQk.signed(total, nDigits), weight = utilQk.signed(link.weight, nDigits)
    return cut == 'delivered' ?
      `delivered by the last head of each path, of any block: ${value} of ${weight}; what is left passes no attention at all` :
      `through the heads of block L${cut}: ${value} of ${weight}; the bypass is what crosses at other blocks`
  }

  function addBar(sel, max){
    var width = 34
    var x = d => d.total/max*width/2
    var svg = sel.append('svg').at({width, height: 9, 'aria-hidden': 'true'})
    svg.append('path').at({d: `M${width/2},0V9`, stroke: '#999'})
    svg.append('rect').at({
      x: d => width/2 + Math.min(0, x(d)), y: 1, width: d => Math.abs(x(d)), height: 7, fill: d => utilQk.colorOf(d.total),
    })
  }

  function markSelected(){
    var {cut} = qk.state
    var isSelected = d => d.cut === cut
    sel.selectAll('.qk-cut')
      .classed('is-selected', isSelected)
      .at({'aria-selected': isSelected, tabindex: d => isSelected(d) ? 0 : -1})
      .filter(isSelected).each(intoView)
    sel.select('.qk-more').text(cut == 'delivered' ?
      'Every path counts once, at its last head: these parts add up over all blocks.' :
      'Each block is a cut of the whole edge and sums to it by itself: cuts overlap, never add them.')
  }

  // Of many blocks some are below the fold of their own list; nothing around it scrolls.
  function intoView(){
    var list = this.parentNode
    var top = this.offsetTop - list.offsetTop
    list.scrollTop = d3.clamp(top + this.offsetHeight - list.clientHeight, list.scrollTop, top)
  }

  qk.fns.edge.push(render)
}

window.init?.()
