// What circuit-tracer's page needs of d3-jetpack, written for it anew. Loaded right after d3.

// Elements by 'tag.class#id', attributes and styles by camelCase names, places
;(function(){
  var proto = d3.selection.prototype

  function parseName(name){
    var [tag, ...parts] = name.split(/(?=[.#])/)
    var named = mark => parts.filter(d => d[0] == mark).map(d => d.slice(1))
    return {tag, classes: named('.'), id: named('#')[0]}
  }

  // d3's own creator makes the element, in its parent's namespace.
  function creator(name){
    if (typeof name == 'function') return name
    var {tag, classes, id} = parseName(name)
    var create = d3.creator(tag)
    if (!classes.length && !id) return create
    return function(){
      var node = create.call(this)
      if (classes.length) node.setAttribute('class', classes.join(' '))
      if (id) node.id = id
      return node
    }
  }

  var nativeAppend = proto.append
  proto.append = function(name){
    return nativeAppend.call(this, creator(name))
  }

  // The first such element below each, appended where there is none
  proto.selectAppend = function(name){
    var {tag, classes, id} = parseName(name)
    var selector = tag + classes.map(d => '.' + CSS.escape(d)).join('') + (id ? '#' + CSS.escape(id) : '')
    var create = creator(name)
    return this.select(function(){
      return this.querySelector(selector) || this.appendChild(create.apply(this, arguments))
    })
  }

  // One element for each datum, after what is there; data may be an iterable or a function of the parent's
  proto.appendMany = function(name, data){
    return this.selectAll(null).data(data).enter().append(name)
  }

  // Each parent once, with its own datum
  proto.parent = function(){
    return d3.selectAll(new Set(this.nodes().map(d => d.parentNode).filter(d => d)))
  }

  var hyphenate = name => name.replace(/[A-Z]/g, d => '-' + d.toLowerCase())

  // strokeWidth and whatever else is a CSS property as well has hyphens as an attribute; viewBox has not.
  var attributeName = memoize(name =>
    name in document.documentElement.style || /^(aria|data)[A-Z]/.test(name) ? hyphenate(name) : name)
  var styleName = memoize(name => name.startsWith('--') ? name : hyphenate(name))
  var takesNumber = memoize(name => CSS.supports(name, '2'))

  function memoize(fn){
    var known = new Map()
    return key => {
      if (!known.has(key)) known.set(key, fn(key))
      return known.get(key)
    }
  }

  proto.at = function(name, value){
    if (typeof name != 'string') return setEach(this, name, this.at)
    var attribute = attributeName(name)
    return arguments.length < 2 ? this.attr(attribute) : this.attr(attribute, value)
  }

  // Numbers are pixels unless the property takes plain ones, as opacity does.
  proto.st = function(name, value){
    if (typeof name != 'string') return setEach(this, name, this.st)
    var style = styleName(name)
    if (arguments.length < 2) return this.style(style)
    if (takesNumber(style)) return this.style(style, value)
    if (typeof value != 'function') return this.style(style, withUnit(value))
    return this.style(style, function(d, i, nodes){ return withUnit(value.call(this, d, i, nodes)) })
  }

  function withUnit(value){
    return typeof value == 'number' ? value + 'px' : value
  }

  function setEach(sel, values, set){
    Object.entries(values).forEach(([name, value]) => set.call(sel, name, value))
    return sel
  }

  // To [x, y], or along one axis (0: x, 1: y) to a number
  proto.translate = function(place, axis){
    return this.each(function(d, i, nodes){
      var at = typeof place == 'function' ? place.call(this, d, i, nodes) : place
      var [x, y] = axis === undefined ? at : axis ? [0, at] : [at, 0]
      if (this instanceof SVGElement) this.setAttribute('transform', `translate(${x},${y})`)
      else this.style.transform = `translate(${x}px,${y}px)`
    })
  }
})()

// HTML: the page's own, with texts of graph files in it, which are anyone's. Only the elements and
// attributes that the page writes are made; every other tag is shown as the text that it is.
;(function(){
  var tags = {
    html: new Set(['a', 'b', 'br', 'code', 'div', 'i', 'span']),
    svg: new Set(['linearGradient', 'stop']),
  }
  var attributes = {
    html: new Set(['class', 'href', 'rel', 'style', 'target']),
    svg: new Set(['id', 'x1', 'x2', 'y1', 'y2', 'gradientUnits', 'spreadMethod', 'offset', 'stop-color', 'stop-opacity']),
  }
  var styles = ['color', 'font-size']

  function sanitize(html, kind){
    var known = new RegExp(`<(?!/?(${[...tags[kind]].join('|')})[\\t\\n\\f\\r />])`, 'gi')
    var text = html.replace(known, '&lt;')
    var template = document.createElement('template') // nothing in it loads or runs
    template.innerHTML = kind == 'svg' ? `<svg>${text}</svg>` : text
    var root = kind == 'svg' ? template.content.firstChild : template.content
    root.querySelectorAll('*').forEach(node => clean(node, kind))
    return Array.from(root.childNodes, d => document.importNode(d, true))
  }

  function clean(node, kind){
    if (!tags[kind].has(node.localName)) return node.remove()
    Array.from(node.attributes).forEach(({name, value}) => {
      if (!attributes[kind].has(name) || name == 'href' && !isAddress(value)) node.removeAttribute(name)
      else if (name == 'style') node.setAttribute(name, styles.filter(d => node.style[d]).map(d => `${d}: ${node.style[d]}`).join('; '))
    })
  }

  // What the browser would open, as it understands it
  function isAddress(value){
    var link = document.createElement('a')
    link.href = value
    return link.protocol == 'http:' || link.protocol == 'https:'
  }

  var nativeHtml = d3.selection.prototype.html
  d3.selection.prototype.html = function(value){
    if (!arguments.length) return nativeHtml.call(this)
    if (value == null || value === '') return nativeHtml.call(this, '')
    return this.each(function(d, i, nodes){
      var html = typeof value == 'function' ? value.call(this, d, i, nodes) : value
      this.replaceChildren(...sanitize(String(html ?? ''), this instanceof SVGElement ? 'svg' : 'html'))
    })
  }
})()

// Data and charts
;(function(){
  d3.nestBy = function(array, key){
    return Array.from(d3.group(array, key), ([key, values]) => Object.assign(values, {key}))
  }

  d3.clamp = (min, value, max) => Math.max(min, Math.min(max, value))

  // Layers that fill sel over each other, each with its origin inside the margins: 's' a group of an
  // svg, 'd' a div, 'c' the context of a canvas
  d3.conventions = function({sel=d3.select('body'), totalWidth, totalHeight, width, height, margin, layers='s'}={}){
    margin = {top: 20, right: 20, bottom: 20, left: 20, ...margin}
    var [marginX, marginY] = [margin.left + margin.right, margin.top + margin.bottom]
    totalWidth = totalWidth ?? (width === undefined ? sel.node().offsetWidth : width + marginX)
    totalHeight = totalHeight ?? (height === undefined ? sel.node().offsetHeight : height + marginY)
    width = Math.max(0, totalWidth - marginX) // negative sizes are errors
    height = Math.max(0, totalHeight - marginY)

    if (layers.length > 1 && getComputedStyle(sel.node()).position == 'static') sel.st({position: 'relative'})
    var place = layers.length > 1 ? {position: 'absolute', left: 0, top: 0} : {}
    var addLayer = {
      s: () => sel.append('svg').at({width: totalWidth, height: totalHeight}).st(place)
        .append('g').translate([margin.left, margin.top]),
      d: () => sel.append('div').st({...place, width, height}).translate([margin.left, margin.top]),
      c: () => {
        var ratio = window.devicePixelRatio || 1
        var ctx = sel.append('canvas').at({width: totalWidth*ratio, height: totalHeight*ratio})
          .st({...place, width: totalWidth, height: totalHeight})
          .node().getContext('2d')
        ctx.scale(ratio, ratio)
        ctx.translate(margin.left, margin.top)
        return ctx
      },
    }

    var c = {sel, margin, width, height, totalWidth, totalHeight}
    c.layers = Array.from(layers, d => addLayer[d]())
    c.svg = c.layers[layers.indexOf('s')]
    c.x = d3.scaleLinear().range([0, width])
    c.y = d3.scaleLinear().range([height, 0])
    c.xAxis = d3.axisBottom(c.x)
    c.yAxis = d3.axisLeft(c.y)
    c.drawAxis = function(svg=c.svg){
      svg.append('g.axis.x').translate([0, height]).call(c.xAxis)
      svg.append('g.axis.y').call(c.yAxis)
    }
    return c
  }

  // One line of text for each function of the datum, beside the pointer
  d3.attachTooltip = function(sel, tooltipSel=d3.select('.tooltip'), fieldFns=[]){
    sel
      .on('mouseover.attachTooltip', (ev, d) => {
        tooltipSel.classed('tooltip-hidden', false).html('')
          .appendMany('div', fieldFns.map(fn => fn(d))).text(d => d)
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
