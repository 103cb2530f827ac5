// Testing the explanation: one component of the head's score scaled, and what the model says then.
//
// Nothing runs before it is asked for. One request is under way at a time, the last wish is asked
// next, and an answer to anything else is dropped.
window.initQkSteer = function({data, cgSel, qk}){
  var nControls = 20
  var colors = {before: '#a0a0a0', after: '#222'}
  var settings = {isOpen: false, of: null, where: 'here', scope: 'head', factor: 0, norms: 'frozen', freeze: 'none'}
  var ability = null // 'ready', or why not, as steering() says it, once it is known
  var choices = [] // what can be tested here
  var wanted = null // {query, tested}: the request whose answer is to be shown, and what it is of
  var asking = null // the query under way
  var shown = null // {query, tested, document}
  qk.data.steering().then(d => {
    ability = d
    sayState('')
    renderForm()
  })

  var sel = cgSel.select('.qk-test').html('').at({'data-qk': 'test'})
    .on('keydown', onKey)
  var toggleSel = sel.append('button.qk-test-toggle')
    .at({type: 'button', title: 'scale a component in this head alone and run the model again (t)', 'aria-expanded': false})
    .on('click', () => setOpen(!settings.isOpen))
  var bodySel = sel.append('div.qk-test-body').at({role: 'group', 'aria-label': 'test it'})
  var formSel = bodySel.append('div.qk-controls')
  var stateSel = bodySel.append('div.qk-state').at({role: 'status', 'aria-live': 'polite', 'data-qk': 'test-state'})
  var resultSel = bodySel.append('div.qk-test-result')

  var tips = {
    of: 'what to scale: a component of either side, with what it adds to the score; a click on its row above chooses it, too',
    where: 'at which positions of the prompt',
    scope: 'in which heads: the queries or keys of these alone change, never their values',
    factor: 'what its activation is multiplied with: 0 removes it, 1 changes nothing, 2 doubles it',
    norms: 'norms frozen: denominators of the clean run, as in the terms above, so that the score changes by exactly (factor - 1) × what the component adds. ' +
      'Norms live: the denominators of the edited heads are computed again with the edit.',
    freeze: 'heads that are not edited keep their clean patterns, so that none makes up for those that are; otherwise all that follows is computed again',
    run: `run the prompt clean, with this edit, and with up to ${nControls} controls of either kind`,
  }

  // The form ---------------------------------------------------------------------------------------

  var addSelect = (name, label) => formSel.append(`select.qk-test-${name}`).at({'aria-label': label, title: tips[name]})
    .on('change', function(){ set({[name]: this.value}) })
  var ofSel = addSelect('of', 'what to test')
  var whereSel = addSelect('where', 'at which positions')
  var scopeSel = addSelect('scope', 'in which heads')
  var factorSel = formSel.append('label.qk-test-label').at({title: tips.factor})
  factorSel.append('span').text('factor ')
  var rangeSel = factorSel.append('input').at({type: 'range', min: -2, max: 2, step: .25, 'data-qk': 'test-factor', 'aria-label': 'factor'})
    .property('value', settings.factor)
    .on('input', function(){
      valueSel.text(factorName(+this.value))
      resultSel.classed('is-old', asking || +this.value != settings.factor)
    })
    .on('change', function(){
      settings.factor = +this.value
      run()
    })
  var valueSel = factorSel.append('output.qk-test-value').text(factorName(settings.factor))
  addSelect('norms', 'norms').appendMany('option', ['frozen', 'live']).at({value: d => d}).text(d => `norms ${d}`)
  var freezeSel = formSel.append('label.qk-test-label').at({title: tips.freeze})
  freezeSel.append('input').at({type: 'checkbox', 'aria-label': 'freeze other heads’ patterns'})
    .on('change', function(){ set({freeze: this.checked ? 'patterns' : 'none'}) })
  freezeSel.append('span').text(' freeze other patterns')
  var runSel = formSel.append('button.qk-test-run').at({type: 'button', title: tips.run, 'data-qk': 'test-run'})
    .text('run').on('click', run)

  // While open it takes the heatmap's room, so what was measured changes.
  function setOpen(isOpen){
    if (isOpen == settings.isOpen) return
    settings.isOpen = isOpen
    renderForm()
    qk.fns.resize.forEach(fn => fn())
  }

  // By key; from a term's row with its component
  function open(element){
    if (!qk.state.answer?.table) return false
    var term = element?.closest?.('[data-qk=query-term], [data-qk=key-term]')
    setOpen(true)
    if (term) term.click()
    ;(ability == 'ready' ? rangeSel : toggleSel).node().focus()
  }

  function choose(component, side){
    if (settings.isOpen && ability == 'ready') set({of: nameOf({component, side})})
  }

  // Another setting is another test, which runs at once where a result is in view.
  function set(changes){
    var isOther = 'of' in changes && changes.of != settings.of
    Object.assign(settings, changes)
    if (isOther) settings.where = 'here'
    renderForm()
    if (wanted) run()
  }

  // A component is the same one in another table if it is the same feature or kind.
  function nameOf({component, side}){
    return component ? [side, component.kind, component.checkpoint, component.feature].join() : 'output'
  }

  function renderForm(){
    var {place, answer} = qk.state
    var table = answer?.table
    var isReady = ability == 'ready'
    sel.st({display: place && table ? '' : 'none'}).classed('is-open', settings.isOpen && !!table).classed('is-testing', settings.isOpen && isReady && !!table)
    toggleSel.text(`Test it ${settings.isOpen ? '▾' : '▸'}`).at({'aria-expanded': settings.isOpen})
    bodySel.st({display: settings.isOpen ? '' : 'none'})
    formSel.st({display: isReady ? '' : 'none'})
    if (!place || !table) return
    if (!isReady) sayState(...problem())

    choices = ['key', 'query'].flatMap(side => table[`${side}_components`].map(component => ({component, side, position: table[side]})))
      .concat({side: null, position: place.query})
    if (!choices.some(d => nameOf(d) == settings.of)) settings.of = nameOf(firstChoice())
    ofSel.html('')
    ofSel.appendMany('optgroup', d3.groups(choices, d => d.side))
      .at({label: ([side]) => side ? `${side} side, at ${utilQk.tokenName(data, table[side])}` : `${utilQk.headName(place)} itself`})
      .appendMany('option', ([, ofSide]) => ofSide)
      .at({value: nameOf}).text(optionName)
    ofSel.property('value', settings.of)

    var chosen = choice()
    var at = utilQk.tokenName(data, chosen.position)
    fill(whereSel, {here: `at ${at} alone`, all: chosen.component?.kind == 'feature' ? 'wherever it is active' : 'at every position'}, settings.where)
    var [name, listed] = [utilQk.headName(place), listedHeads()]
    if (testedHeads('layer').length < 2) settings.scope = 'head'
    fill(scopeSel, {head: `in ${name} alone`, ...(testedHeads('layer').length < 2 ? {} :
      {layer: `in ${listed.includes(place.head) ? '' : `${name} and `}L${place.layer}’s ${listed.length} heads listed above`})}, settings.scope)
    markTerm()
  }

  function fill(selectSel, options, value){
    selectSel.html('').appendMany('option', Object.entries(options)).at({value: d => d[0]}).text(d => d[1])
    selectSel.property('value', value)
  }

  function optionName({component}){
    if (!component) return 'its output: what it writes'
    var label = utilQk.componentLabel(data, component)
    var name = component.kind == 'feature' ? `${utilQk.featureName(component)} ` : ''
    return `${utilQk.glyphs[component.kind]} ${name}${label.length > 42 ? label.slice(0, 40) + '…' : label}  ${utilQk.signed(component.marginal)}`
  }

  // The key side's largest feature: keys compete, a query's part may lift them all
  function firstChoice(){
    var of = fn => d3.greatest(choices.filter(d => d.component && fn(d)), d => Math.abs(d.component.marginal))
    return of(d => d.side == 'key' && d.component.kind == 'feature') || of(d => d.component.kind == 'feature') || of(() => true) || choices[0]
  }

  function choice(){
    return choices.find(d => nameOf(d) == settings.of)
  }

  // The heads of the chosen edge in this head's layer
  function listedHeads(){
    var {place, link} = qk.state
    return link && qk.data.isResidual(link) && link.layer === place.layer ? link.head_loadings.map(d => d[0]) : []
  }

  function testedHeads(scope){
    return Array.from(new Set([qk.state.place.head, ...(scope == 'layer' ? listedHeads() : [])])).sort(d3.ascending)
  }

  function markTerm(){
    var chosen = settings.isOpen && ability == 'ready' && choice()
    cgSel.selectAll('.qk-terms .qk-row').classed('is-tested', d => chosen && d.component && d.component == chosen.component)
  }

  function onKey(ev){
    if (ev.key == 'Escape' && settings.isOpen) {
      setOpen(false)
      toggleSel.node().focus()
    } else if (ev.key == 'Enter' && ev.target.matches('input, select')) run()
    else if (!ev.target.matches('input, select')) return
    else return ev.stopPropagation()
    ev.preventDefault()
    ev.stopPropagation()
  }

  // Running ----------------------------------------------------------------------------------------

  function request(){
    var {place} = qk.state
    var {component, side, position} = choice()
    return new URLSearchParams({
      heads: testedHeads(settings.scope).map(head => utilQk.headName({layer: place.layer, head})).join(),
      ...(component ? {side, checkpoint: component.checkpoint, features: component.kind == 'feature' ? component.feature : component.kind} : {}),
      ...(settings.where == 'here' ? {positions: position} : {}),
      factor: settings.factor,
      norms: settings.norms,
      freeze: settings.freeze,
      controls: nControls,
      seed: 0,
      query: place.query,
    }).toString().replaceAll('%2C', ',')
  }

  async function run(){
    if (ability != 'ready' || !qk.state.answer?.table) return
    wanted = {query: request(), tested: {...choice(), place: qk.state.place}}
    if (shown?.query == wanted.query) return settle()
    resultSel.classed('is-old', true)
    sayState('running …')
    if (asking) return
    while (wanted && asking != wanted.query) {
      asking = wanted.query
      var document = await qk.data.steer(asking)
      if (asking != wanted?.query) continue // another is wanted by now, or none
      shown = document.problem ? null : {...wanted, document}
      if (document.problem == 'other') {
        ability = 'other'
        forget()
        qk.checkMemory()
        break
      }
      settle(document)
    }
    asking = null
  }

  function settle({problem, message}={}){
    sayState(problem == 'gone' ? 'The server does not answer. Start it again, then run this once more.' : message || '')
    renderResult()
  }

  // Another table: what was shown belongs to the one before.
  function forget(){
    wanted = shown = null
    sayState('')
    renderForm()
    renderResult()
  }

  function problem(){
    var {prompt, slug} = data.metadata
    if (!ability) return ['asking the server …']
    if (ability == 'transcoder') return ['Steering is for residual graphs, and this is a graph of transcoders. The command that makes one of residual dictionaries, and keeps its model in memory:', command('-d DICTIONARIES')]
    if (ability == 'other' || ability == 'unnamed') return ['The server cannot run the model on this graph: see the note at the top. The command that makes the graph, and keeps it and its model in memory:', command('-d DICTIONARIES')]
    return ['No model is in memory, so nothing can be run: start with one of these.', command('-d DICTIONARIES'), 'circuit-tracer-qk demo']

    function command(dictionaries){
      return `circuit-tracer-qk attribute -m MODEL ${dictionaries} -p ${JSON.stringify(prompt)} --slug ${slug} --graph_file_dir DIR --server`
    }
  }

  function sayState(text, ...commands){
    stateSel.html('').st({display: text ? '' : 'none'})
    stateSel.append('span').text(text)
    stateSel.appendMany('code', commands).text(d => d)
  }

  // The result -------------------------------------------------------------------------------------

  function renderResult(){
    resultSel.html('').classed('is-old', false)
    if (!shown) return
    var {document, tested} = shown
    var row = document.attention.find(d => d.head == utilQk.headName(tested.place) && d.query == tested.place.query)
    renderSummary(document, tested, row)
    var columnSel = resultSel.append('div.qk-test-columns')
    renderPrediction(columnSel.append('div'), document)
    renderControls(columnSel.append('div'), document, tested)
    renderAttention(document, tested, row)
    if (document.notes.length) resultSel.append('div.qk-more').text(`Controls: ${document.notes.join('; ')}.`)
  }

  function renderSummary({changes, outputs}, {place}, row){
    var [before, after] = [row.scores_before[place.key], row.scores_after[place.key]]
    var nDigits = utilQk.digits([before, after])
    var change = utilQk.signed(after - before, nDigits)
    var summarySel = resultSel.append('div.qk-test-summary')
    summarySel.append('b').text(`${utilQk.headName(place)} score ${utilQk.signed(before, nDigits)} → ${utilQk.signed(after, nDigits)}`)
      .at({'data-qk': 'test-score', 'data-before': before, 'data-after': after})
    summarySel.append('span').text(` (${change}) · pattern ${share(row.before[place.key])} → ${share(row.after[place.key])} of key ${utilQk.tokenName(data, place.key)}`)
    summarySel.append('span.qk-test-changed').text(` · changed: ${changed(changes, outputs)}`)
      .at({title: changes.slice(0, 20).map(d => `${d.head} ${d.side} ${d.position}: ${d.before.toPrecision(4)} → ${d.after.toPrecision(4)}`).join('\n')})
  }

  // How much the edit came to: of what, at how many positions, in how many heads
  function changed(changes, outputs){
    var count = (all, fn, name) => (n => `${n} ${name}${n == 1 ? '' : 's'}`)(new Set(all.map(fn)).size)
    var scaled = outputs.flatMap(({head, factors}) => factors.flatMap((factor, position) => factor == 1 ? [] : {head, position}))
    var all = changes.concat(scaled)
    if (!all.length) return 'nothing'
    var what = !changes.length ? 'output' : typeof changes[0].component == 'number' ? 'activation' : changes[0].component
    return `${what} at ${count(all, d => d.position, 'position')} in ${count(all, d => d.head, 'head')}`
  }

  // Probabilities on one scale from 0 to 1, so that a small effect looks small
  function renderPrediction(sel, {tokens}){
    var rowsSel = sel.append('table.qk-test-table').at({'aria-label': 'next tokens before and after'})
    var headSel = rowsSel.append('tr')
    headSel.appendMany('th', ['next token', 'before', '', 'after', 'change']).text(d => d)
      .st({color: d => d == 'after' ? colors.after : null})
    var width = 56
    var trSel = rowsSel.appendMany('tr', tokens)
      .at({'data-qk': 'test-prediction', 'data-token': d => d.token, 'data-id': d => d.id, 'data-before': d => d.before, 'data-after': d => d.after})
    trSel.append('th').append('span.qk-test-token').text(d => `“${utilQk.isolate(d.token)}”`).at({title: d => d.token})
    trSel.append('td').text(d => share(d.before))
    var svg = trSel.append('td').append('svg').at({width, height: 11, 'aria-hidden': 'true'})
    svg.append('rect').at({width, height: 11, fill: '#f4f4f4'})
    svg.append('rect').at({y: 1, width: d => d.before*width, height: 4, fill: colors.before})
    svg.append('rect').at({y: 6, width: d => d.after*width, height: 4, fill: colors.after})
    trSel.append('td').text(d => share(d.after))
    trSel.append('td').text(d => change(d.after - d.before)).st({color: d => utilQk.colorOf(d.after - d.before)})
  }

  // Every control a tick, beside the edit itself
  function renderControls(sel, document, {place}){
    var [token] = document.tokens
    var name = `“${utilQk.isolate(token.token)}”`
    var rows = [
      {of: 'edit', name: 'this edit', values: [token.after]},
      {of: 'features', name: 'other features', spread: token.controls, values: document.controls.map(d => d.probabilities[0]),
        title: 'the same factor on other features of the same positions, of similar activation, in the same heads'},
      {of: 'heads', name: 'other heads', spread: token.head_controls, values: document.head_controls.map(d => d.probabilities[0]),
        title: `the same edit in other heads of L${place.layer}`},
    ]
    var width = 84
    var tableSel = sel.append('table.qk-test-table').at({'aria-label': `controls: ${token.token} after other edits`})
    tableSel.append('tr').appendMany('th', [`${name} after`, '0 … 1', 'mean ± sd', 'range', 'n', 'moved as far'])
      .text(d => d)
      .at({title: d => ({
        '0 … 1': 'one line a run, the grey one where it is in the clean run',
        'mean ± sd': 'over the controls',
        'moved as far': 'how many controls moved it at least as far from its clean probability as this edit did',
      })[d]})
    var trSel = tableSel.appendMany('tr', rows)
      .at({title: d => d.title, 'data-of': d => d.of, 'data-qk': d => d.of == 'edit' ? null : 'test-controls'})
    trSel.filter(d => d.spread).at({
      'data-n': d => d.spread.n, 'data-mean': d => d.spread.mean, 'data-std': d => d.spread.std,
      'data-low': d => d.spread.low, 'data-high': d => d.spread.high,
    })
    trSel.append('th').text(d => d.name)
    var svg = trSel.append('td').append('svg').at({width: width + 2, height: 11, 'aria-hidden': 'true'})
      .append('g').translate([1, 0])
    svg.append('rect').at({width, height: 11, fill: '#f4f4f4'})
    svg.append('path').at({d: `M${token.before*width},0V11`, stroke: colors.before, strokeWidth: 2})
    svg.appendMany('path', d => d.values).at({
      d: d => `M${d*width},1V10`, stroke: colors.after, strokeWidth: 1.2,
    })
    trSel.append('td').text(d => d.of == 'edit' ? share(token.after) : d.spread ? `${share(d.spread.mean)} ± ${share(d.spread.std)}` : 'none')
    trSel.append('td').text(d => d.spread ? `${share(d.spread.low)} – ${share(d.spread.high)}` : '')
    trSel.append('td').text(d => d.spread?.n ?? '')
    var far = d => d.values.filter(e => Math.abs(e - token.before) >= Math.abs(token.after - token.before)).length
    trSel.append('td').text(d => d.spread ? `${far(d)} of ${d.spread.n}` : '')
  }

  // As the attention above: one place a key, its pattern before in grey and after in black
  function renderAttention(document, {place}, row){
    var maxKeys = 120
    var all = row.before.map((before, key) => ({key, before, after: row.after[key]}))
    var largest = d3.sort(all, d => -Math.max(d.before, d.after)).slice(0, maxKeys)
    var keys = d3.sort(largest, d => d.key)
    var left = 52, height = 26
    var width = Math.max(200, qk.widthOf('.qk-attention') - left - 22)
    var x = d3.scaleBand(keys.map(d => d.key), [0, Math.min(width, keys.length*46)]).paddingInner(.12)
    var w = x.bandwidth()
    var svg = resultSel.append('svg.qk-keys')
      .at({width: left + width, height: height + 14, role: 'img', 'aria-label': `pattern of ${utilQk.headName(place)} from query ${place.query} before and after`})
      .append('g').translate([left, 2])
    svg.appendMany('text', ['pattern', 'before', 'after']).at({x: -6, y: (d, i) => 7 + i*10, textAnchor: 'end', fill: d => colors[d] || '#777'}).text(d => d)
    var keySel = svg.appendMany('g.qk-test-key', keys).translate(d => [x(d.key), 0])
      .at({'data-qk': 'test-key', 'data-key': d => d.key, 'data-before': d => d.before, 'data-after': d => d.after})
      .classed('is-selected', d => d.key == place.key)
    keySel.append('title').text(d => `key ${utilQk.tokenName(data, d.key)}\npattern ${share(d.before)} → ${share(d.after)}`)
    keySel.append('rect').at({width: w, height, fill: '#f6f6f6'})
    keySel.appendMany('rect', d => [d.before, d.after]).at({
      x: (d, i) => (.08 + i*.44)*w, width: w*.4, y: d => height*(1 - d), height: d => d*height, fill: (d, i) => i ? colors.after : colors.before,
    })
    keySel.append('text').at({x: w/2, y: height + 9, textAnchor: 'middle'}).text(d => w > 11 || d.key % 5 == 0 ? d.key : '')
  }

  // Three decimals, or what is left of tiny ones
  function share(value){
    return value >= .0005 || value == 0 ? d3.format('.3f')(value) : d3.format('.0e')(value)
  }

  function change(value){
    return value && Math.abs(value) < .0005 ? `${value > 0 ? '+' : '-'}${d3.format('.0e')(Math.abs(value))}` : utilQk.signed(value)
  }

  function factorName(value){
    return `×${value}`
  }

  qk.test = {open, choose}
  qk.fns.table.push(forget)
  qk.fns.view.push(markTerm)
  qk.fns.resize.push(() => !resultSel.classed('is-old') && renderResult())
}

window.init?.()
