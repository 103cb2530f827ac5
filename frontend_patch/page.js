// Every touch of the page that the panel sits in: what it fetches, what it shows as HTML, how it
// keeps its address, and how many rows it draws. Loaded after its scripts and before it starts.
window.qkPage = (function(){
  var nativeFetch = window.fetch.bind(window)
  var config = nativeFetch('./qk/config.json', {cache: 'no-cache'}).then(d => d.json())
    .catch(() => ({live: {}, online: false})) // files alone, without a server of ours
  var savedKeys = ['qk', 'qkEdge', 'qkCut', 'qkTokens', 'qkView']

  // Requests to other machines end here unless the server was started with --online.
  window.fetch = async function(input, init){
    var url = new URL(input.url || input, window.location)
    if (url.origin != window.location.origin){
      if ((await config).online) return nativeFetch(input, init)
      return new Response(null, {status: 404, statusText: 'offline'})
    }
    if (url.pathname.startsWith('/save_graph/')) return save(input, init, url.pathname.slice('/save_graph/'.length))
    return nativeFetch(input, init)
  }

  // The page shows no more than that something went wrong; the panel says what.
  async function save(input, init, slug){
    var res = await nativeFetch(input, withSelection(init, slug))
    if (!res.ok) res.clone().json().then(d => qkPage.say?.(d.error, 15), () => null)
    return res
  }

  // The page saves a fixed list of parameters; the panel's selection joins them, and which graph is
  // shown: its file may hold another one by now.
  function withSelection(init, slug){
    var body = JSON.parse(init.body)
    body.digest = digests.get(`./graph_data/${slug}.json`) ?? null
    savedKeys.forEach(key => {
      var value = util.params.get(key)
      if (value) body.qParams[key] = value
    })
    return {...init, body: JSON.stringify(body)}
  }

  // Graphs and features are asked for again with their ETag, where the page would show a stale
  // copy; a feature of which nothing is stored is a state, not an error.
  var nativeGetFile = util.getFile
  var files = new Map()
  var digests = new Map() // of the graphs that were read last from each path
  util.getFile = function(path, useCache=true, fileType=null, range=null){
    var isFeature = /^\.\/(graph_data|features)\/.*\/\d+\.json$/.test(path)
    if (!isFeature && !path.startsWith('./graph_data/')) return nativeGetFile(path, useCache, fileType, range)
    if (!files.has(path)) {
      files.set(path, isFeature ? getFeature(path) : getGraph(path))
      if (!isFeature) files.get(path).finally(() => files.delete(path)) // graphs are written anew
    }
    return files.get(path)
  }

  async function getGraph(path){
    var res = await nativeFetch(path, {cache: 'no-cache'})
    if (!res.ok) throw new Error(`${path}: ${res.status}`)
    var graph = await res.json()
    digests.set(path, graph?.metadata?.info?.digest)
    return graph
  }

  async function getFeature(path){
    var isLocal = path.startsWith('./graph_data/')
    try {
      var res = await (isLocal ? window.fetch(path, {cache: 'no-cache'}) : nativeGetFile(path))
      if (!isLocal) return res
      if (res.ok) return {...emptyFeature(), ...await res.json()}
    } catch (error) {
      // the server is gone, or the file is no JSON
    }
    var {online} = await config
    return emptyFeature(isLocal || online ? 'No examples are stored for this feature.' :
      'The examples of these features lie on circuit-tracer’s host: start the server with --online to see them.')
  }

  function emptyFeature(qkNote){
    return {examples_quantiles: [], top_logits: [], bottom_logits: [], qkNote}
  }

  var nativeInitFeatureExamples = window.initFeatureExamples
  window.initFeatureExamples = function(options){
    var inner = nativeInitFeatureExamples(options)

    async function loadFeature(...args){
      return inner.loadFeature(...args).catch(() => emptyFeature())
    }

    async function renderFeature(...args){
      var feature = await inner.renderFeature(...args).catch(() => emptyFeature())
      if (!feature) return // it is drawn already
      if (!feature.examples_quantiles?.length){
        options.containerSel.select('.feature-example-list').html('')
          .append('div.qk-more').text(feature.qkNote || 'No examples are stored for this feature.')
      }
      if (!feature.top_logits?.length && !feature.bottom_logits?.length){
        options.containerSel.select('.feature-example-logits').html('')
      }
      return feature
    }

    return {...inner, loadFeature, renderFeature}
  }

  // Tooltips are made as HTML from the texts of the graph file.
  var escapes = {'&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;', "'": '&#39;'}
  function escape(value){
    return typeof value == 'string' ? value.replace(/[&<>"']/g, d => escapes[d]) : value
  }
  function escaped(d){
    return Object.fromEntries(Object.entries(d).map(([key, value]) => [escape(key), escape(value)]))
  }
  var nativeShowTooltip = utilCg.showTooltip
  utilCg.showTooltip = (ev, d) => nativeShowTooltip(ev, escaped(d))
  utilCg.addFeatureTooltip = sel => sel
    .on('mouseover.tt', (ev, d) => utilCg.showTooltip(ev, d))
    .on('mouseout.tt', () => utilCg.hideTooltip())

  // The address: a step is one that Back undoes, and a colon stays one so that people can read it.
  function setParams(params, isStep){
    var url = new URL(window.location)
    Object.entries(params).forEach(([key, value]) => value == null ? url.searchParams.delete(key) : url.searchParams.set(key, value))
    url.search = url.searchParams.toString().replaceAll('%3A', ':')
    if (url.href != window.location.href) history[isStep ? 'pushState' : 'replaceState'](null, '', url)
  }

  // A click on another node is a step; another graph has another selection.
  util.params.set = function(key, value){
    var before = util.params.get(key)
    var isOther = key == 'slug' && before != value
    var dropped = isOther ? Object.fromEntries(savedKeys.map(d => [d, null])) : {}
    setParams({...dropped, [key]: value === null ? null : String(value)}, key == 'clickedId' && value && before && before != value)
  }

  // The list of a node's connections draws every one of them; only the largest are left in it.
  // Called after the list is made, with the page's own arguments.
  function limitConnections({renderAll, data, cgSel}){
    var maxRows = 60
    var sections = []

    // before the list is drawn, which is called by name and so comes last
    renderAll.clickedId.fns.push(() => {
      sections = ['tmpClickedSourceLink', 'tmpClickedTargetLink'].map(key => [1, -1].map(sign => {
        var nodes = data.nodes.filter(d => d[key]?.weight*sign > 0)
        var small = d3.sort(nodes, d => -Math.abs(d[key].weight)).slice(maxRows)
        var sum = d3.sum(small, d => d[key].weight)
        small.forEach(d => d[key] = null)
        return {n: small.length, sum}
      })).flat()
    })

    function addRest(){
      cgSel.selectAll('.node-connections .section').each(function(_, i){
        if (!sections[i]?.n) return
        d3.select(this).append('div.qk-more').datum(null)
          .text(`… ${sections[i].n} smaller, together ${utilQk.signed(sections[i].sum)}`)
      })
    }
    renderAll.clickedId.fns['qkConnections'] = addRest
    renderAll.hClerpUpdate.fns.push(addRest)
  }

  // The page calls every error one of an MLP; a residual graph's are of the residual stream.
  function nameErrors({data}){
    if (data.qk?.graph_kind != 'residual') return
    data.nodes.concat(data.features).filter(d => d.isError)
      .forEach(d => d.clerp = d.clerp.replace(/^Err: mlp/, 'Err: residual'))
  }

  return {config, savedKeys, fetch: nativeFetch, setParams, limitConnections, nameErrors}
})()

window.init?.()
