// What the graph file says about heads and QK attributions, by place, and what the server can add.
window.initQkData = function({data}){
  var {qk, links, metadata} = data
  var placeKey = d => [d.layer, d.head, d.query, d.key].join()
  var rowKey = d => [d.layer, d.head, d.query].join()

  var tables = new Map((qk?.attributions || []).map(d => [placeKey(d), d]))
  var rows = new Map((qk?.rows || []).map(d => [rowKey(d), d]))
  var asked = new Map()

  // A graph of circuit-tracer's own has links without heads.
  var hasHeads = links.some(d => isResidual(d))
  function isResidual(link){
    return Array.isArray(link.head_loadings) && (!link.head_loadings.length || Array.isArray(link.head_loadings[0]))
  }

  // Parts of a link that sum to its weight: {name, total, direct, pattern, head?}
  function parts(link){
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

  // One of: {table, row}, {row, masked}, {problem: 'absent' | 'gone' | 'refused', message}
  async function load(place){
    var key = placeKey(place)
    var row = rows.get(rowKey(place))
    if (tables.has(key)) return {table: tables.get(key), row}
    if (row && row.scores[place.key] === null) return {row, masked: true}
    if (!asked.has(key)) asked.set(key, ask(place))
    var answer = await asked.get(key)
    if (answer.problem == 'gone') asked.delete(key) // it may come back
    return answer.problem ? {...answer, row} : answer
  }

  async function ask(place){
    try {
      var {live} = await qkPage.config
      if (!live.includes(metadata.slug)) return {problem: 'absent'}
      var query = ['layer', 'head', 'query', 'key'].map(d => `${d}=${place[d]}`).join('&')
      var res = await qkPage.fetch(`./qk/table/${encodeURIComponent(metadata.slug)}?${query}`)
      var body = await res.json()
    } catch (error) {
      return {problem: 'gone'}
    }
    if (!res.ok) return {problem: 'refused', message: body.error}
    return {table: body.table, row: body.row, masked: !body.table}
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
    hasQk: tables.size > 0,
    isResidual,
    parts,
    edges,
    load,
    isKnown,
    nodeOf,
    isLive: () => qkPage.config.then(d => d.live.includes(metadata.slug)),
    places: () => Array.from(tables.values()),
  }
}

window.init?.()
