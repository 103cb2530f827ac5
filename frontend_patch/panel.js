// The panel: what is selected, where it is kept, and which keys move it.
//
// node clicked -> edges -> heads of one edge -> why one head looked there. Each step chooses the
// strongest of the next, so that a click on a node already shows a reason.
window.initQkPanel = function({visState, renderAll, data, cgSel}){
  var sel = cgSel.select('.qk-panel')
  if (!sel.node()) return
  var fns = {edges: [], edge: [], head: [], table: [], view: [], hover: [], resize: []}
  var qk = {
    data: window.initQkData({data}),
    fns,
    state: {node: null, tokens: null, link: null, cut: null, place: null, answer: null, view: 'marginals'},
    isStarted: false,
    selectTokens,
    selectEdge,
    selectCut,
    selectHead,
    placeOfPart,
    hoverTerm: d => run('hover', d),
    widthOf,
    say,
    checkMemory,
  }
  var {state} = qk
  var run = (name, d) => fns[name].forEach(fn => fn(d))

  // Measured once until the cell is resized: measuring after drawing lays the whole page out.
  var widths = {}
  function widthOf(selector){
    return widths[selector] = widths[selector] || sel.select(selector).node().clientWidth
  }
  fns.resize.push(() => widths = {})

  // Layout -----------------------------------------------------------------------------------------

  sel.html('').at({role: 'region', 'aria-label': 'heads and QK attributions', tabindex: -1})
  addHatches()
  var otherSel = sel.append('div.qk-state.qk-other').at({role: 'status', 'data-qk': 'other-graph'}).st({display: 'none'})
  var topSel = sel.append('div.qk-top')
  topSel.append('div.qk-edges')
  topSel.append('div.qk-heads')
  var whySel = sel.append('div.qk-why')
  var whyHeadSel = whySel.append('div.qk-why-head')
  var whyTitleSel = whyHeadSel.append('div.qk-title')
  var viewSel = whyHeadSel.append('span.qk-buttons').at({role: 'tablist', 'aria-label': 'view'})
    .appendMany('button', ['marginals', 'pairs'])
    .text(d => d)
    .at({type: 'button', role: 'tab', title: d => `show ${d} (m)`})
    .on('click', (ev, d) => selectView(d))
  var placeSel = whyHeadSel.append('input.qk-place')
    .at({'aria-label': 'head, query and key', title: 'any head and positions, such as L3H5:q14:k5, then Enter', spellcheck: 'false'})
    .on('change', goToPlace)
    .on('keydown', ev => ev.key == 'Escape' ? null : ev.stopPropagation())
  var stateSel = whySel.append('div.qk-state').at({role: 'status'})
  whySel.append('div.qk-attention')
  var bodySel = whySel.append('div.qk-body')
  bodySel.append('div.qk-terms')
  bodySel.append('div.qk-heatmap')
  whySel.append('div.qk-test')
  var barSel = sel.append('div.qk-bottom')
  barSel.append('div.qk-save')
  var saySel = barSel.append('div.qk-say').at({role: 'status', 'aria-live': 'polite'})

  // Selecting --------------------------------------------------------------------------------------

  function selectNode(){
    state.node = data.nodes.idToNode[visState.clickedId] || null
    state.tokens = null
    run('edges')
    autoSelect()
  }

  function selectTokens(tokens){
    state.tokens = tokens
    run('edges')
    autoSelect(true)
  }

  // The strongest edge in view and its largest head
  function autoSelect(isStep){
    var link = qk.data.edges(state)[0]?.link || null
    setLink(link)
    show(isStep)
  }

  function selectEdge(link){
    setLink(link)
    show(true)
  }

  // A cut of a transcoder link, and its largest head
  function selectCut(cut){
    state.cut = cut
    state.place = placeOf(state.link, cut)
    show(true)
  }

  function setLink(link){
    state.link = link
    state.cut = link && qk.data.bestCut(link)
    state.place = link && placeOf(link, state.cut)
  }

  function placeOf(link, cut){
    var head = qk.data.parts(link, cut).find(d => d.kind == 'head')
    return head ? placeOfPart(link, head) : null
  }

  // Where a head carried an edge: from source to target, or between the positions listed
  function placeOfPart(link, {layer, head, pairs}){
    var [query, key] = pairs?.[0] || [link.targetNode.ctx_idx, link.sourceNode.ctx_idx]
    return {layer, head, query, key}
  }

  function selectHead(place){
    state.place = place
    show(true)
  }

  function selectView(view){
    state.view = view
    showView()
    writeAddress(false)
  }

  async function show(isStep){
    writeAddress(isStep)
    run('edge')
    run('head')
    placeSel.property('value', state.place ? utilQk.placeName(state.place) : '')
    var {place} = state
    var answer = null
    if (place) {
      var waiting = setTimeout(() => showState('asking the server …'), 150)
      answer = await qk.data.load(place)
      clearTimeout(waiting)
      if (state.place != place) return // another was chosen meanwhile
    }
    state.answer = answer
    checkMemory()
    showWhy()
  }

  function showWhy(){
    var {place, answer, link} = state
    whyTitleSel.html('')
    whyTitleSel.append('b').text('Why ')
    if (place) {
      var {query, key} = place
      whyTitleSel.append('span')
        .text(`${utilQk.headName(place)} looked from ${utilQk.tokenName(data, query)} to ${utilQk.tokenName(data, key)}`)
      var {table, row} = answer
      if (table) whyTitleSel.append('div.qk-note').text(scoreLine(table, row))
    }
    showState(problem(answer, link))
    bodySel.st({display: answer?.table ? '' : 'none'})
    showView()
    run('table')
  }

  // Only differences between keys move a softmax, so the runner-up is named beside the score.
  function scoreLine(table, row){
    var capped = table.score_capped != table.score ? `, ${utilQk.signed(table.score_capped)} after the soft-cap` : ''
    var others = row ? row.scores.map((score, key) => ({score, key})).filter(d => d.score !== null && d.key != table.key) : []
    var best = d3.greatest(others, d => d.score)
    var isMoved = state.link && qk.data.isResidual(state.link) && state.link.sourceNode.ctx_idx != table.key
    return `score ${utilQk.signed(table.score)}${capped} · pattern ${d3.format('.4f')(table.pattern)}` +
      (best ? ` · best other key ${utilQk.tokenName(data, best.key)}: ${utilQk.signed(best.score)}` : '') +
      (isMoved ? ` · not the key of the chosen edge, ${state.link.sourceNode.ctx_idx}` : '')
  }

  function showView(){
    viewSel.classed('active', d => d == state.view).at({'aria-selected': d => d == state.view})
    run('view')
  }

  // States in which there is nothing to explain ---------------------------------------------------

  function problem(answer, link){
    var {prompt, slug} = data.metadata
    var dictionaries = qk.data.isTranscoderGraph ? '-t TRANSCODERS' : '-d DICTIONARIES'
    var command = `circuit-tracer-qk attribute -m MODEL ${dictionaries} -p ${JSON.stringify(prompt)} --slug ${slug} --graph_file_dir DIR`
    if (!qk.data.hasHeads) return ['This graph has neither head loadings nor QK attributions. The command that adds them to a saved graph of transcoders, and the one that makes a graph of residual dictionaries:',
      `circuit-tracer-qk augment GRAPH.pt -m MODEL -t TRANSCODERS --slug ${slug} --graph_file_dir DIR`, command]
    if (!answer) {
      if (link && qk.data.isTranscoder(link)) return ['Choose a head.'].filter(() => qk.data.cuts(link).length)
      if (link && link.layer == null) return ['A logit edge reads the last residual stream directly: there is no head to explain.']
      return [link ? 'Choose a head.' : 'Choose an edge and one of its heads.']
    }
    if (answer.masked) return [`Masked: key ${state.place.key} lies outside this head’s attention window, so its score never enters the softmax.`]
    if (answer.problem == 'gone') return ['The server does not answer. Start it again, then choose the head once more:', 'circuit-tracer-qk start-server --graph_file_dir DIR']
    if (answer.problem == 'refused' || answer.problem == 'busy') return [answer.message]
    if (answer.problem == 'missing' || answer.problem == 'damaged') return [
      `This table was written beside the graph file, to ${answer.file}, and that file ${answer.problem == 'missing' ? 'is not there' : 'cannot be read'}. ` +
      `Keep the folder ${answer.file.split('/')[0]} beside the graph file; reload the page if the graph was written anew.`,
    ]
    if (answer.problem == 'other' || answer.problem == 'unnamed') return [
      'This table was not written to the graph file, and the server cannot compute it: see the note at the top. With this graph in memory it answers for any head and position:',
      command + ' --server',
    ]
    if (answer.problem == 'absent') return [
      qk.data.hasQk ? 'This table was not written to the graph file, and this server has no model in memory. With one it answers for any head and position:' :
        'This graph was written without QK attributions. The command that makes them:',
      qk.data.hasQk ? command + ' --server' : command,
    ]
    return []
  }

  function checkMemory(){
    qk.data.memory().then(showMemory)
  }

  // All that is shown stays the file's, so this is said as long as it holds.
  function showMemory(memory){
    var text = {
      other: 'The graph shown here is another one than the graph of this name in the server’s memory. Every number here is of the graph shown, as it was written to its file; the server computes nothing more for it.',
      unnamed: 'This file does not say which graph it is of: an earlier version, or circuit-tracer itself, wrote it. So the server’s memory is not asked, and only what was written is shown. Write the file anew to ask for more.',
    }[memory]
    otherSel.text(text || '').st({display: text ? '' : 'none'})
    sel.classed('has-other', !!text)
  }

  function showState(lines){
    lines = [lines].flat()
    stateSel.html('').st({display: lines.length ? '' : 'none'})
    if (lines[0]) stateSel.append('span').text(lines[0])
    stateSel.appendMany('code', lines.slice(1)).text(d => d)
  }

  function say(text, seconds=4){
    saySel.text(text)
    clearTimeout(say.timer)
    say.timer = setTimeout(() => saySel.text(''), 1000*seconds)
  }

  function goToPlace(){
    var place = utilQk.parsePlace(this.value)
    if (place && place.key <= place.query && place.query < data.metadata.prompt_tokens.length) return selectHead(place)
    say('write a head and positions such as L3H5:q14:k5, the key not after the query')
    placeSel.property('value', state.place ? utilQk.placeName(state.place) : '')
  }

  // The address ------------------------------------------------------------------------------------

  function writeAddress(isStep){
    qkPage.setParams({
      qk: state.place && utilQk.placeName(state.place),
      qkEdge: state.link?.linkId,
      qkCut: state.cut == null || state.cut === cutOf(state.link, state.place) ? null : state.cut,
      qkTokens: state.tokens?.join('-'),
      qkView: state.view == 'pairs' ? 'pairs' : null,
    }, isStep)
  }

  // Whether the address, or what was saved, named a selection
  function readAddress(isFirst){
    var isInAddress = qkPage.savedKeys.some(key => util.params.get(key))
    var saved = key => isInAddress || !isFirst ? util.params.get(key) : data.qParams?.[key]
    var link = data.links.idToLink[saved('qkEdge')]
    var place = utilQk.parsePlace(saved('qk'))
    if (!link && !place) return false
    var tokens = /^(\d+)-(\d+)$/.exec(saved('qkTokens') || '')
    state.node = data.nodes.idToNode[visState.clickedId] || null
    state.tokens = tokens ? [+tokens[1], +tokens[2]] : null
    setLink(link || edgeOf(place))
    if (state.link) state.cut = cutOf(state.link, place, saved('qkCut'))
    state.place = place
    state.view = saved('qkView') == 'pairs' ? 'pairs' : 'marginals'
    run('edges')
    show(false)
    return true
  }

  // The strongest edge in view that a head at a place may have carried
  function edgeOf({layer, head, query, key}){
    var isHere = d => d.kind == 'head' && d.head == head && d.pairs[0]?.[0] == query && d.pairs[0]?.[1] == key
    return qk.data.edges(state).map(d => d.link).find(d => qk.data.isTranscoder(d) ? qk.data.parts(d, layer).some(isHere) :
      d.layer === layer && d.targetNode.ctx_idx == query && d.sourceNode.ctx_idx == key) || null
  }

  // The cut that an address meant: the one it names, else the block of its head
  function cutOf(link, place, named){
    var cuts = qk.data.cuts(link).map(d => d.cut)
    return cuts.find(d => String(d) === named) ?? cuts.find(d => d === place?.layer) ?? qk.data.bestCut(link)
  }

  d3.select(window).on('popstate.qk', () => {
    var clickedId = util.params.get('clickedId')
    if (clickedId != visState.clickedId) {
      visState.clickedId = shownId = clickedId
      renderAll.clickedId()
    }
    readAddress() || selectNode()
  })

  // Keys -------------------------------------------------------------------------------------------

  sel.on('keydown', ev => {
    if (ev.ctrlKey || ev.metaKey || ev.altKey || ev.target.matches('input, select')) {
      if (ev.key == 'Escape') { ev.target.blur(); ev.stopPropagation() }
      return
    }
    var move = {
      ArrowUp: () => moveRow(-1),
      ArrowDown: () => moveRow(1),
      ArrowLeft: () => ev.target.matches('[data-qk=layer]') ? moveRow(-1) : moveHead(-1),
      ArrowRight: () => ev.target.matches('[data-qk=layer]') ? moveRow(1) : moveHead(1),
      '[': () => moveKey(-1),
      ']': () => moveKey(1),
      t: () => qk.test.open(ev.target),
      m: () => selectView(state.view == 'pairs' ? 'marginals' : 'pairs'),
      Enter: () => ev.target.matches('[role=option]') && clickRow(ev.target, ev),
      ' ': () => ev.target.matches('[role=option]') && clickRow(ev.target, ev),
      Escape: stepBack,
    }[ev.key]
    if (!move || ev.target.matches('button') && (ev.key == 'Enter' || ev.key == ' ')) return
    if (move() === false) return
    ev.preventDefault()
    ev.stopPropagation()
  })

  function clickRow(row){
    var labelled = row.querySelector('.qk-label.is-node')
    ;(row.matches('[data-qk$=term]') && labelled || row).dispatchEvent(new MouseEvent('click', {bubbles: true}))
  }

  // The next row of the list in focus, of the edges otherwise; those of the upper half are chosen
  // as one passes them
  function moveRow(step){
    var focused = sel.node().contains(document.activeElement) ? document.activeElement.closest('[role=option]') : null
    var listSel = d3.select(focused?.closest('[role=listbox]') || sel.select('.qk-edge-list').node())
    var rows = listSel.selectAll('[role=option]').nodes()
    if (!rows.length) return false
    var at = rows.indexOf(focused)
    if (at < 0) at = rows.findIndex(d => d.classList.contains('is-selected'))
    var row = rows[d3.clamp(0, at + step, rows.length - 1)]
    listSel.selectAll('[role=option]').at({tabindex: -1})
    row.setAttribute('tabindex', 0)
    row.focus()
    if (['edge', 'layer', 'head'].includes(row.dataset.qk)) row.dispatchEvent(new MouseEvent('click', {bubbles: true}))
  }

  function moveHead(step){
    if (!state.place) return false
    var {place, link} = state
    if (link && qk.data.isTranscoder(link)) return movePart(step)
    var heads = link && link.layer == place.layer ? link.head_loadings.map(d => d[0]) :
      Array.from(new Set(qk.data.places().filter(d => d.layer == place.layer).map(d => d.head))).sort(d3.ascending)
    if (!heads.length) return false
    var at = heads.indexOf(place.head)
    selectHead({...place, head: heads[at < 0 ? 0 : d3.clamp(0, at + step, heads.length - 1)]})
  }

  // The next head of a transcoder link's cut
  function movePart(step){
    var {link, cut, place} = state
    var heads = qk.data.parts(link, cut).filter(d => d.kind == 'head')
    if (!heads.length) return false
    var at = heads.findIndex(d => d.layer == place.layer && d.head == place.head)
    selectHead(placeOfPart(link, heads[at < 0 ? 0 : d3.clamp(0, at + step, heads.length - 1)]))
  }

  function moveKey(step){
    if (!state.place) return false
    selectHead({...state.place, key: d3.clamp(0, state.place.key + step, state.place.query)})
  }

  // Closes the card, then lets go of the head, then of the edge, then the page's own Escape
  function stepBack(){
    if (qk.examples.isOpen()) return void qk.examples.hide()
    if (state.place) state.place = null
    else if (state.link) state.link = state.cut = null
    else return false
    show(true)
  }

  // Starting ---------------------------------------------------------------------------------------

  function addHatches(){
    var defsSel = sel.append('svg').at({width: 0, height: 0, 'aria-hidden': 'true'}).st({position: 'absolute'}).append('defs')
    Object.entries(utilQk.color).forEach(([name, color]) => {
      var patternSel = defsSel.append('pattern').at({id: `qk-hatch-${name}`, width: 4, height: 4, patternUnits: 'userSpaceOnUse', patternTransform: 'rotate(45)'})
      patternSel.append('rect').at({width: 4, height: 4, fill: '#fff'})
      patternSel.append('rect').at({width: 2, height: 4, fill: color})
    })
  }

  qkPage.say = say
  checkMemory()
  qk.examples = window.initQkExamples({visState, renderAll, data, qk})
  ;['initQkEdges', 'initQkHeads', 'initQkAttention', 'initQkTerms', 'initQkHeatmap', 'initQkSteer', 'initQkSave']
    .forEach(name => window[name]({visState, renderAll, data, cgSel, qk}))
  ;['.qk-heads', '.qk-attention', '.qk-heatmap'].forEach(widthOf)

  // The page renders the clicked node many times; only another node is a new selection.
  var shownId
  renderAll.clickedId.fns['qkPanel'] = () => {
    if (qk.isStarted && visState.clickedId == shownId) return
    var isFirst = !qk.isStarted
    shownId = visState.clickedId
    qk.isStarted = true
    qk.examples.hide()
    if (!isFirst || !readAddress(true)) selectNode()
  }

  sel.datum().resizeFn = util.debounce(() => run('resize'), 100)
}

window.init?.()
