"use strict";
// Shows the preference pairs. Model text reaches the page through textContent alone.
(async () => {
  const PAGE = 25;
  const $ = (id) => document.getElementById(id);
  const form = $("filters"), list = $("list"), count = $("count"), more = $("more");
  const OF_JUDGEMENTS = "judge", scoreOfPairs = list.dataset.score;

  async function unpack(base64) {
    const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  let pairs;
  try {
    pairs = await unpack($("data").textContent);
  } catch (error) {
    count.textContent = "This browser cannot unpack the pairs: it needs DecompressionStream (2023 or newer).";
    return;
  }

  const shown = (value) => value === null ? "unreadable" : String(Math.round(value * 100) / 100);
  pairs.forEach((pair, order) => {
    pair.order = order;
    pair.gap = pair.cs === null || pair.rs === null ? 0 : pair.cs - pair.rs;
    pair.long = Math.max(pair.cl, pair.rl);
    pair.longer = pair.cl - pair.rl;
    pair.apart = pair.d === null ? -1 : pair.d;
    pair.gold = pair.g === null ? "" : ["reversed", "tied", "right"][Math.sign(pair.g[0] - pair.g[1]) + 1];
    pair.words = [pair.id, ...pair.m.map((turn) => turn[1]), pair.p, pair.c, pair.r, ...pair.cv.map((v) => v[2]), ...pair.rv.map((v) => v[2])]
      .join("\n").toLowerCase();
  });

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function modelText(text) {
    const made = element("p", "text", text === "" ? "(empty)" : text);
    made.dir = "auto";
    return made;
  }

  const scoreName = (pair) => pair.from === OF_JUDGEMENTS ? "rating by the meta-judge" : scoreOfPairs;

  function side(name, text, score, length, votes, gold) {
    const made = element("div", "side " + name);
    made.append(element("h4", "", name === "chosen" ? "Chosen" : "Rejected"));
    const facts = [length + " characters"];
    if (score) facts.unshift(score);
    if (gold !== null) facts.push("gold " + shown(gold));
    made.append(element("p", "facts", facts.join(", ")), modelText(text));
    votes.forEach(([vote, wrote, words, told = []], i) => {
      const said = element("div", "vote");
      const wroteToo = wrote === null ? "" : " (it wrote " + shown(wrote) + ")";
      const which = votes.length > 1 || words ? "Vote " + (i + 1) : "Judged";
      said.append(element("p", "facts", which + ": " + shown(vote) + wroteToo));
      for (const line of told) said.append(element("p", "facts told", line));
      if (words || !told.length) said.append(modelText(words));
      made.append(said);
    });
    return made;
  }

  function body(pair) {
    const made = element("div", "body");
    const facts = [pair.id];
    if (pair.from) facts.push(pair.from === OF_JUDGEMENTS ? "a pair of judgements" : pair.from);
    if (pair.by) facts.push("principle " + pair.by);
    if (pair.vs) facts.push(pair.vs);
    if (pair.gold) facts.push("gold order: " + (pair.gold === "right" ? "the same" : pair.gold));
    if (pair.w[0] !== 1) facts.push("weight " + shown(pair.w[0]));
    if (pair.w[1] !== 0) facts.push("smoothing " + shown(pair.w[1]));
    made.append(element("p", "facts", facts.join(" · ")), element("h4", "hidden", "Prompt"));
    for (const [who, said] of pair.m) made.append(element("p", "facts turn", who), modelText(said));
    if (pair.m.length) made.append(element("p", "facts turn", "The user"));
    made.append(modelText(pair.p));
    const sides = element("div", "sides"), name = scoreName(pair);
    const score = (value) => name && name + " " + shown(value);
    sides.append(
      side("chosen", pair.c, score(pair.cs), pair.cl, pair.cv, pair.g && pair.g[0]),
      side("rejected", pair.r, score(pair.rs), pair.rl, pair.rv, pair.g && pair.g[1]),
    );
    made.append(sides);
    if (!pair.cv.length && !pair.rv.length) {
      const why = list.dataset.why;
      made.append(element("p", "facts", "No votes on these replies" + (why ? ": " + why : "") + "."));
    }
    return made;
  }

  function item(pair) {
    const made = element("li"), details = element("details"), summary = element("summary");
    const facts = ["iteration " + pair.t], name = scoreName(pair);
    if (name) facts.push(shown(pair.cs) + " against " + shown(pair.rs));
    facts.push(pair.cl + " and " + pair.rl + " characters");
    if (pair.d !== null) facts.push("votes apart " + shown(pair.d));
    const start = element("span", "start", pair.p.slice(0, 200));
    start.dir = "auto";
    if (name) summary.append(element("span", "gap", "gap " + shown(pair.gap)));
    summary.append(element("span", "facts", facts.join(" · ")), start);
    details.append(summary);
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) details.append(body(pair));
    });
    made.append(details);
    return made;
  }

  let matching = [], visible = 0;

  function extend() {
    const next = matching.slice(visible, visible + PAGE).map(item);
    list.append(...next);
    visible += next.length;
    more.hidden = visible >= matching.length;
    count.textContent = matching.length.toLocaleString("en") + " of " + pairs.length.toLocaleString("en") +
      " pairs match" + (visible < matching.length ? ", " + visible.toLocaleString("en") + " shown" : "");
    return next;
  }

  function apply() {
    const wish = Object.fromEntries(new FormData(form));
    const least = (key) => wish[key] === "" || wish[key] === undefined ? -Infinity : Number(wish[key]);
    const most = (key) => wish[key] === "" || wish[key] === undefined ? Infinity : Number(wish[key]);
    const text = wish.text.trim().toLowerCase();
    matching = pairs.filter((pair) =>
      (!text || pair.words.includes(text)) &&
      (!wish.iteration || String(pair.t) === wish.iteration) &&
      pair.gap >= least("gap_from") && pair.gap <= most("gap_to") &&
      pair.long >= least("long_from") && pair.long <= most("long_to") &&
      (!wish.longer || Math.sign(pair.longer) === (wish.longer === "chosen" ? 1 : -1)) &&
      pair.apart >= least("apart") &&
      (!wish.gold || pair.gold === wish.gold));
    const key = wish.sort.slice(0, -1), sign = wish.sort.endsWith("-") ? -1 : 1;
    matching.sort((a, b) => sign * (a[key] - b[key]) || a.order - b.order);
    list.replaceChildren();
    visible = 0;
    extend();
  }

  for (const iteration of [...new Set(pairs.map((pair) => pair.t))].sort((a, b) => a - b)) {
    form.elements.iteration.append(new Option(String(iteration), String(iteration)));
  }
  const has = { gold: pairs.some((pair) => pair.g), votes: pairs.some((pair) => pair.d !== null), score: scoreOfPairs };
  for (const field of form.querySelectorAll("[data-needs]")) {
    if (!has[field.dataset.needs]) field.remove();
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", apply);
  form.addEventListener("reset", () => setTimeout(apply));
  more.addEventListener("click", () => {
    const next = extend();
    if (next.length) next[0].querySelector("summary").focus();
  });
  form.hidden = false;
  apply();
})();
