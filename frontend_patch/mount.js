// One more cell of the page's grid, and the panel in it.
;(function(){
  // Where each cell stands: beside each other on a wide screen; on a narrow one the page scrolls
  // down to the connections and examples. People move the cells as they like.
  var layouts = {
    wide: {
      'link-graph': [0, 0, 8, 8], subgraph: [0, 8, 8, 8],
      'node-connections': [8, 0, 5, 6], 'feature-detail': [8, 6, 5, 10],
      'qk-panel': [13, 0, 9, 16],
    },
    narrow: {
      'link-graph': [0, 0, 7, 8], subgraph: [0, 8, 7, 8], 'qk-panel': [7, 0, 8, 16],
      'node-connections': [0, 16, 7, 8], 'feature-detail': [7, 16, 8, 8],
    },
  }
  var screenRows = 16
  var minHeight = 760

  var nativeInitGridsnap = window.initGridsnap
  window.initGridsnap = function(options){
    var {gridData, sel} = options
    var layout = layouts[window.innerWidth < 1600 ? 'narrow' : 'wide']
    gridData.push({cur: {}, class: 'qk-panel'})
    gridData.forEach(d => {
      if (!layout[d.class]) return
      var [x, y, w, h] = layout[d.class]
      d.cur = {x, y, w, h}
    })
    var rows = d3.max(gridData, d => d.cur.y + d.cur.h)
    var share = rows/screenRows
    sel.st({height: `max(${100*share}%, ${minHeight*share}px)`, position: 'relative'})
    return nativeInitGridsnap(options)
  }

  // Called last of the cells that list what the panel explains
  var nativeInitConnections = window.initCgNodeConnections
  window.initCgNodeConnections = function(options){
    qkPage.nameErrors(options)
    nativeInitConnections(options)
    qkPage.limitConnections(options)
    window.initQkPanel(options)
  }
})()

window.init?.()
