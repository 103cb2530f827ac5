// The part of d3-jetpack's surface that circuit-tracer's page uses, for d3 7. Loaded right after d3.
;(function(){
  var proto = d3.selection.prototype

  // Selections -------------------------------------------------------------------------------------

  // 'div.row.big#first' as tag, classes and id
  function parseTag(str){
    var [, tag, rest] = /^([^.#]*)(.*)$/.exec(str)
    var classes = (rest.match(/\.[^.#]+/g) || []).map(d => d.slice(1))
    var id = rest.match(/#[^.#]+/)?.[0].slice(1)
    return {tag: tag || 'div', classes, id}
  }

  function toCreator(name){
    if (typeof name == 'function' || !/[.#]/.test(name)) return name
    var {tag, classes, id} = parseTag(name)
    var create = d3.creator(tag)
    return function(){
      var node = create.apply(this, arguments)
      if (classes.length) node.setAttribute('class', classes.join(' '))
      if (id) node.setAttribute('id', id)
      return node
    }
  }

  var nativeAppend = proto.append
  proto.append = function(name){
    return nativeAppend.call(this, toCreator(name))
  }

  proto.selectAppend = function(name){
    var {tag, classes, id} = parseTag(name)
    var selector = tag + classes.map(d => '.' + CSS.escape(d)).join('') + (id ? '#' + CSS.escape(id) : '')
    var create = toCreator(name)
    create = typeof create == 'function' ? create : d3.creator(create)
    return this.select(function(){
      return this.querySelector(selector) || this.appendChild(create.apply(this, arguments))
    })
  }

  proto.appendMany = function(name, data){
    return this.selectAll(null).data(data).join(enter => enter.append(toCreator(name)))
  }

  proto.parent = function(){
    var seen = new Set()
    return this
      .filter(function(){ return !seen.has(this.parentNode) && seen.add(this.parentNode) })
      .select(function(){ return this.parentNode })
  }

  // Attributes and styles --------------------------------------------------------------------------

  // SVG keeps the case of these; every other camelCase name is one with hyphens.
  var keptCase = new Set(('viewBox preserveAspectRatio gradientUnits gradientTransform spreadMethod patternUnits ' +
    'patternTransform patternContentUnits clipPathUnits markerWidth markerHeight markerUnits refX refY textLength ' +
    'lengthAdjust startOffset pathLength tableValues stdDeviation').split(' '))
  var unitless = new Set(('opacity zIndex zoom flex flexGrow flexShrink order fontWeight lineHeight fillOpacity strokeOpacity ' +
    'stopOpacity columns columnCount tabSize orphans widows').split(' '))
  var hyphenate = str => str.replace(/[A-Z]/g, d => '-' + d.toLowerCase())
  var attributeName = str => keptCase.has(str) ? str : hyphenate(str)

  proto.at = function(name, value){
    if (typeof name == 'object') {
      Object.entries(name).forEach(([key, d]) => this.attr(attributeName(key), d))
      return this
    }
    return arguments.length == 1 ? this.attr(attributeName(name)) : this.attr(attributeName(name), value)
  }

  proto.st = function(name, value){
    if (typeof name == 'object') {
      Object.entries(name).forEach(([key, d]) => setStyle(this, key, d))
      return this
    }
    return arguments.length == 1 ? this.style(hyphenate(name)) : setStyle(this, name, value)
  }

  function setStyle(sel, name, value){
    var withUnit = d => typeof d == 'number' && !unitless.has(name) ? d + 'px' : d
    var style = name.startsWith('--') ? name : hyphenate(name)
    return sel.style(style, typeof value != 'function' ? withUnit(value) : function(){
      return withUnit(value.apply(this, arguments))
    })
  }

  // translate([x, y]), or translate(x, 0) and translate(y, 1) along one axis
  proto.translate = function(xy, axis){
    return this.each(function(){
      var at = typeof xy == 'function' ? xy.apply(this, arguments) : xy
      var [x, y] = axis === undefined ? at : axis ? [0, at] : [at, 0]
      if (this instanceof SVGElement) this.setAttribute('transform', `translate(${x},${y})`)
      else this.style.transform = `translate(${x}px,${y}px)`
    })
  }

  // HTML -------------------------------------------------------------------------------------------

  // The page writes text of graph files as HTML. What it needs for its own markup stays, every other
  // element becomes the text that it was written as; nothing that runs or loads survives.
  var kept = new Set('a b br code div i span lineargradient stop'.split(' '))
  var keptAttributes = new Set(('class id style title target rel offset stop-color stop-opacity x1 x2 y1 y2 ' +
    'gradientunits spreadmethod').split(' '))

  function sanitized(html){
    var template = document.createElement('template') // inert: nothing in it loads or runs
    template.innerHTML = html
    clean(template.content)
    return template.innerHTML
  }

  function clean(parent){
    Array.from(parent.childNodes).forEach(node => {
      if (node.nodeType == Node.TEXT_NODE) return
      if (node.nodeType != Node.ELEMENT_NODE || !kept.has(node.localName.toLowerCase())) {
        return node.replaceWith(document.createTextNode(node.outerHTML ?? ''))
      }
      Array.from(node.attributes).forEach(({name, value}) => {
        var isLink = node.localName == 'a' && name == 'href' && /^(https?:|\.{0,2}\/|#|[\w-]+(\/|$))/i.test(value)
        if (!isLink && !keptAttributes.has(name.toLowerCase())) node.removeAttribute(name)
      })
      clean(node)
    })
  }

  var nativeHtml = proto.html
  proto.html = function(value){
    if (!arguments.length) return nativeHtml.call(this)
    var safe = d => d == null || d === '' ? d : sanitized(String(d))
    return nativeHtml.call(this, typeof value != 'function' ? safe(value) : function(){
      return safe(value.apply(this, arguments))
    })
  }

  // Data and charts --------------------------------------------------------------------------------

  d3.nestBy = function(array, key){
    return Array.from(d3.group(array, key), ([key, values]) => Object.assign(values, {key}))
  }

  d3.clamp = (min, value, max) => Math.max(min, Math.min(max, value))

  // A chart in a container: layers over each other ('s' svg, 'd' div, 'c' canvas), scales and axes
  d3.conventions = function({sel, totalWidth, totalHeight, width, height, margin, layers='s'} = {}){
    sel = sel || d3.select('body')
    margin = {top: 20, right: 20, bottom: 20, left: 20, ...margin}
    var node = sel.node()
    totalWidth = totalWidth ?? (width === undefined ? node.offsetWidth : width + margin.left + margin.right)
    totalHeight = totalHeight ?? (height === undefined ? node.offsetHeight : height + margin.top + margin.bottom)
    width = Math.max(0, totalWidth - margin.left - margin.right)
    height = Math.max(0, totalHeight - margin.top - margin.bottom)
    var origin = [margin.left, margin.top]

    var isStacked = layers.length > 1
    if (isStacked) sel.st({position: 'relative'})
    var place = isStacked ? {position: 'absolute', top: 0, left: 0} : {}
    var make = {
      s: () => sel.append('svg').at({width: totalWidth, height: totalHeight}).st({...place, pointerEvents: isStacked ? 'none' : null})
        .append('g').translate(origin),
      d: () => sel.append('div').st({...place, top: isStacked ? margin.top : null, left: isStacked ? margin.left : null, width, height}),
      c: () => {
        var ratio = window.devicePixelRatio || 1
        var canvas = sel.append('canvas').at({width: totalWidth*ratio, height: totalHeight*ratio})
          .st({...place, width: totalWidth, height: totalHeight, pointerEvents: 'none'}).node()
        var ctx = canvas.getContext('2d')
        ctx.scale(ratio, ratio)
        ctx.translate(...origin)
        return ctx
      },
    }
    layers = Array.from(layers, d => make[d]())
    var x = d3.scaleLinear().range([0, width])
    var y = d3.scaleLinear().range([height, 0])
    var c = {
      sel, layers, margin, width, height, totalWidth, totalHeight, x, y,
      svg: layers.find(d => d.node?.() instanceof SVGElement),
      xAxis: d3.axisBottom(x),
      yAxis: d3.axisLeft(y),
    }
    c.drawAxis = (svg=c.svg) => {
      svg.append('g.axis.x').translate([0, height]).call(c.xAxis)
      svg.append('g.axis.y').call(c.yAxis)
    }
    return c
  }

  d3.attachTooltip = function(sel, tooltipSel=d3.select('.tooltip'), fields=[]){
    sel
      .on('mouseover.attachTooltip', (ev, d) => {
        tooltipSel.classed('tooltip-hidden', false).html('')
          .appendMany('div', fields.map(fn => fn(d))).text(d => d)
      })
      .on('mousemove.attachTooltip', ev => {
        var {width, height} = tooltipSel.node().getBoundingClientRect()
        tooltipSel.st({
          left: d3.clamp(20, ev.clientX - width/2, window.innerWidth - width - 20),
          top: window.innerHeight > ev.clientY + 20 + height ? ev.clientY + 20 : ev.clientY - height - 20,
        })
      })
      .on('mouseout.attachTooltip', () => tooltipSel.classed('tooltip-hidden', true))
  }
})()
