// What the graph file says about heads and QK attributions, by place, and what the server can add.
window.initQkData = function({data}){
  var {qk, links, metadata} = data
  var placeKey = d => [d.layer, d.head, d.query, d.key].join()
  var rowKey = d => [d.layer, d.head, d.query].join()

  var tables = new Map((qk?.attributions || []).map(d => [placeKey(d), d]))
  var rows = new Map((qk?.rows || []).map(d => [rowKey(d), d]))
  var asked = new Map()

  // Tables that the file has no room for lie beside it, those of one head in one file.
  var beside = new Map(Object.entries(qk?.sidecars || {}).flatMap(([name, {file, tables}]) => tables
    .map(([query, key]) => utilQk.parsePlace(`${name}:q${query}:k${key}`))
    .filter(d => d)
    .map(place => [placeKey(place), {place, file}])))
  var opened = new Map()

  // A graph of circuit-tracer's own has links without heads.
  var hasHeads = links.some(d => isResidual(d) || isTranscoder(d))
  var isTranscoderGraph = qk?.graph_kind == 'transcoder' || links.some(d => isTranscoder(d))
  function isTranscoder(link){
    return Array.isArray(link.delivered_by)
  }
  function isResidual(link){
    return !isTranscoder(link) && Array.isArray(link.head_loadings) &&
      (!link.head_loadings.length || Array.isArray(link.head_loadings[0]))
  }

  // Where a transcoder link can be cut, each time into parts that sum to its weight: at a block
  // between its ends, or by the head that delivered it. total: what passes heads there.
  function cuts(link){
    if (!isTranscoder(link) || !link.head_loadings.length) return []
    return [{cut: 'delivered', name: 'delivered', total: link.weight - link.attention_free}]
      .concat(link.head_loadings.map(d => ({cut: d.layer, name: `L${d.layer}`, total: link.weight - d.bypass})))
  }

  // The block whose largest head moved most from one position to another
  function bestCut(link){
    var moved = cuts(link).length ? link.head_loadings.flatMap(({layer, heads}) => heads
      .filter(([, , pairs]) => pairs.length && pairs[0][0] != pairs[0][1])
      .map(([, part]) => ({layer, size: Math.abs(part)}))) : []
    return d3.greatest(moved, d => d.size)?.layer ?? (cuts(link).length ? 'delivered' : null)
  }

  // Where a head that delivered was looking, by [query, key, value]: it wrote at the target. It read
  // at the source if it stands at the first block on the way, or if both are one position; other
  // heads are known where the file lists them.
  function pairsOf(link, layer, head, total){
    var query = link.targetNode.ctx_idx, key = link.sourceNode.ctx_idx
    if (query == key || layer == link.head_loadings[0]?.layer) return [[query, key, total]]
    var listed = link.head_loadings.find(d => d.layer == layer)?.heads.find(d => d[0] == head)?.[2] || []
    return listed.filter(d => d[0] == query)
  }

  function transcoderParts(link, cut){
    var headPart = (layer, head, total, pairs) =>
      ({kind: 'head', layer, head, name: utilQk.headName({layer, head}), total, pairs})
    if (cut == 'delivered') {
      var isSame = link.sourceNode.ctx_idx == link.targetNode.ctx_idx
      return link.delivered_by.map(([layer, head, total]) => {
        if (layer === null) return {kind: 'rest', name: 'other heads', total}
        return headPart(layer, head, total, pairsOf(link, layer, head, total))
      }).concat(link.attention_free || isSame ?
        {kind: 'free', name: 'no attention', total: link.attention_free} : [])
    }
    var found = link.head_loadings.find(d => d.layer === cut)
    if (!found) return []
    var others = [{kind: 'rest', name: 'other heads', total: found.rest}, {kind: 'bypass', name: 'bypass', total: found.bypass}]
    return found.heads.map(([head, total, pairs]) => headPart(cut, head, total, pairs))
      .concat(others.filter(d => d.kind == 'bypass' || Math.abs(d.total) > 1e-6*link.absWeight))
  }

  // Parts of a link that sum to its weight: {name, total, head?}, and of a residual link's heads
  // direct and pattern, of a transcoder link's the pairs of positions
  function parts(link, cut){
    if (isTranscoder(link)) return d3.sort(transcoderParts(link, cut), d => d.kind == 'rest' ? 1 : -Math.abs(d.total))
    if (!isResidual(link)) return []
    var heads = link.head_loadings.map(([head, total, direct, pattern]) => ({
      kind: 'head', layer: link.layer, head, name: utilQk.headName({layer: link.layer, head}), total, direct, pattern,
    }))
    var others = [
      {kind: 'residual', name: 'residual', total: link.residual},
      {kind: 'mlp', name: 'MLP', total: link.mlp},
      {kind: 'rest', name: 'other heads', total: link.head_loadings_rest},
    ]
    var isSame = link.sourceNode.ctx_idx == link.targetNode.ctx_idx
    // a rest of what rounding leaves is none
    var isThere = d => d.kind == 'rest' ? Math.abs(d.total) > 1e-6*link.absWeight : d.total || isSame
    return heads.concat(others.filter(isThere))
  }

  // Edges into a node, or from one token to another: cross-position first, then by |weight|.
  function edges({node, tokens}){
    var found = tokens ?
      links.filter(d => d.sourceNode.ctx_idx == tokens[0] && d.targetNode.ctx_idx == tokens[1]) :
      node?.sourceLinks || []
    return d3.sort(found, d => -d.absWeight)
      .map(link => ({link, isCross: link.sourceNode.ctx_idx != link.targetNode.ctx_idx}))
      .sort((a, b) => b.isCross - a.isCross)
  }

  // Whether the server has this graph in memory: 'same'; 'other', another graph of this name;
  // 'unnamed', one of this name, and the file does not say which graph it is of; or 'absent'
  var isOther = false // said by the server, which may be another one than when the page was opened
  async function memory(){
    var live = new Map(Object.entries((await qkPage.config).live))
    if (!live.has(metadata.slug)) return 'absent'
    if (!metadata.info?.digest) return 'unnamed'
    return isOther || live.get(metadata.slug) != metadata.info.digest ? 'other' : 'same'
  }

  // An answer about this graph; {problem: 'gone' | 'refused' | 'busy' | 'other', message} without one
  async function askServer(what, query){
    try {
      var res = await qkPage.fetch(`./qk/${what}/${encodeURIComponent(metadata.slug)}?digest=${metadata.info.digest}&${query}`)
      var body = await res.json()
    } catch (error) {
      return {problem: 'gone'}
    }
    if (res.status == 409) isOther = true
    return res.ok ? body : {problem: {409: 'other', 503: 'busy'}[res.status] || 'refused', message: body.error}
  }

  // One of: {table, row}, {row, masked}, {problem: 'missing' | 'damaged', file}, or a problem with
  // a message as askServer or memory have them
  async function load(place){
    var key = placeKey(place)
    var file = tables.has(key) ? undefined : beside.get(key)?.file
    var problem = file && await openBeside(file)
    var row = rows.get(rowKey(place))
    if (tables.has(key)) return {table: tables.get(key), row}
    if (row && row.scores[place.key] === null) return {row, masked: true}
    if (!asked.has(key)) asked.set(key, ask(place))
    var answer = await asked.get(key)
    if (['gone', 'busy'].includes(answer.problem)) asked.delete(key) // it may answer later
    if (file && ['absent', 'other', 'unnamed'].includes(answer.problem)) return {problem: problem || 'damaged', file, row}
    return answer.problem ? {...answer, row} : answer
  }

  // Reads a head's file once; what is wrong with it, if anything, until it is there
  async function openBeside(file){
    if (!opened.has(file)) opened.set(file, readBeside(file))
    var problem = await opened.get(file)
    if (problem) opened.delete(file)
    return problem
  }

  async function readBeside(file){
    try {
      var res = await qkPage.fetch('./graph_data/' + file.split('/').map(encodeURIComponent).join('/'))
      if (!res.ok) return res.status == 404 ? 'missing' : 'damaged'
      var found = await res.json()
      found.rows.forEach(d => rows.set(rowKey(d), d))
      found.attributions.forEach(d => tables.set(placeKey(d), d))
    } catch (error) {
      return error instanceof TypeError && !res ? 'gone' : 'damaged'
    }
  }

  async function ask(place){
    var state = await memory()
    if (state != 'same') return {problem: state}
    var answer = await askServer('table', ['layer', 'head', 'query', 'key'].map(d => `${d}=${place[d]}`).join('&'))
    return answer.problem ? answer : {table: answer.table, row: answer.row, masked: !answer.table}
  }

  // Whether the model can be steered on this graph's prompt: 'ready', 'transcoder', or as memory
  // says; 'absent', too, where only the graph is in memory
  async function steering(){
    if (isTranscoderGraph) return 'transcoder'
    var state = await memory()
    if (state != 'same') return state
    return (await qkPage.config).steerable?.includes(metadata.slug) ? 'ready' : 'absent'
  }

  // The document of a steered run, or a problem
  function steer(query){
    return askServer('steer', query)
  }

  function isKnown(place){
    return tables.has(placeKey(place)) || !!asked.get(placeKey(place))
  }

  // The graph's node that a component is, where it is one and is shown
  function nodeOf(component){
    return component.node_id === undefined ? undefined : data.nodes.idToNode[component.node_id]
  }

  return {
    hasHeads,
    hasQk: tables.size + beside.size > 0,
    isResidual,
    isTranscoder,
    isTranscoderGraph,
    cuts,
    bestCut,
    parts,
    edges,
    load,
    memory,
    steering,
    steer,
    isKnown,
    nodeOf,
    places: () => Array.from(tables.values()).concat(Array.from(beside.values(), d => d.place)),
  }
}

window.init?.()
