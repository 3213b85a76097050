// The page: what is typed, chosen and clicked. One question at a time; an answer belongs to the talk that asked for it.

import { ask, models, Refused } from "./ask.js";
import * as store from "./talk.js";
import { button, card, element, question } from "./view.js";

const field = id => document.getElementById(id);
const MOST_PANES = 4, MOST_SHOWN = 60, EXAMPLES = [
  "Explain recursion to a ten-year-old, with a short example in Python.",
  "Compare TCP and UDP in a small table.",
  "Write a haiku about the sea in winter.",
  "Give three names for a bakery, each with one sentence that says why.",
];

let served = [], running = null, talk, view = new Map();
const settings = { panes: [], colors: false, temperature: "0", top_p: "", max_tokens: "", seed: "", thinking: "", system: "",
                   ...store.keptSettings() };

// -- models and panes -------------------------------------------------------------------------------------------------------

async function loadModels() {
  try {
    served = await models(field("key").value);
    say("");
  } catch (error) {
    say(error.status === 401 ? "This server asks for a key." : `The list of models did not come: ${error.message}`,
        error.status === 401 ? ["Enter it", openSettings] : ["Try again", loadModels]);
    return;
  }
  const names = served.map(one => one.id);
  settings.panes = settings.panes.filter(pane => names.includes(pane.model)).slice(0, MOST_PANES);
  if (!settings.panes.length)  // the base and its first adapter: what the fine-tuning changed
    settings.panes = names.slice(0, 2).map(model => ({ id: store.name(), model }));
  showPanes();
  showTalk();
}

function showPanes() {
  const many = settings.panes.length > 1;
  field("panes").replaceChildren(...settings.panes.map((pane, number) => {
    const options = served.map(({ id, parent, split }) =>
      element("option", { value: id, textContent: split ? `${id} (split)` : parent ? id : `${id} (base)` }));
    const select = element("select", { ariaLabel: `Model ${number + 1}`, on: { change: event => choose(pane, event.target.value) } },
                           ...options);
    select.value = pane.model;
    return element("span", { className: "pane", data: { pane: number } }, element("i", { ariaHidden: true }), select,
                   many && button("×", `Take ${pane.model} away`, () => drop(pane), { className: "quiet" }));
  }));
  field("compare").hidden = !served.length || settings.panes.length >= MOST_PANES;
  saveSettings();
}

function choose(pane, model) { pane.model = model; showPanes(); }
function drop(pane) { settings.panes = settings.panes.filter(one => one !== pane); showPanes(); }
function compare() {
  const taken = settings.panes.map(pane => pane.model);
  const model = (served.find(one => !taken.includes(one.id)) ?? served[0]).id;
  settings.panes.push({ id: store.name(), model });
  showPanes();
}

// -- asking -----------------------------------------------------------------------------------------------------------------

function body(turn, answer) {
  const number = value => value === "" || value == null ? undefined : Number(value);
  const chosen = Object.fromEntries(["temperature", "top_p", "max_tokens", "seed"].map(name => [name, number(settings[name])]));
  return {
    model: answer.model, messages: store.messages(talk, talk.turns.indexOf(turn), answer.pane), ...chosen,
    ...(settings.thinking && { enable_thinking: settings.thinking === "on" }),
    ...(settings.colors && { logprobs: true, top_logprobs: 5 }),
  };
}

const blank = pane => ({ pane: pane.id, model: pane.model, text: "", reasoning: "", tokens: [], state: "waiting" });

async function write(turn, answer, mine) {
  const show = painter(turn, answer);
  try {
    await ask(answer, body(turn, answer), field("key").value, mine.signal, show);
  } catch (error) {
    if (mine.signal.aborted) answer.state = "stopped";
    else Object.assign(answer, { state: "failed", error: error.message });
    if (error instanceof Refused && error.status === 401) say("This server asks for a key.", ["Enter it", openSettings]);
    if (error instanceof Refused && error.status === 404) loadModels();
  }
  show();
}

// Ask for these answers, all at once; `running` is what stops them.
async function run(turn, answers) {
  const mine = running = new AbortController(), of = talk;
  showState();
  await Promise.all(answers.map(answer => write(turn, answer, mine)));
  if (!mine.forgotten) note(of);
  if (running === mine) { running = null; showState(); }
}

function note(of) {
  of.at = Date.now();
  if (!store.keep(of)) say("The browser has no room for this conversation; delete earlier ones, or it ends with this window.");
  showHistory();
}

function send(text) {
  if (running || !text || !settings.panes.length) return false;
  const turn = { text, answers: settings.panes.map(blank) };
  talk.title ||= text.replace(/\s+/g, " ").slice(0, 80);
  talk.system = settings.system;
  talk.turns.push(turn);
  showTurn(turn);
  note(talk);
  scrollDown(true);
  run(turn, turn.answers);
  return true;
}

function resend(turn, text) {
  if (running) return false;
  talk.turns.splice(talk.turns.indexOf(turn));
  if (!talk.turns.length) talk.title = "";
  showTalk();
  return send(text);
}

function again(turn, answer) {
  if (running) return;
  const pane = settings.panes.find(one => one.id === answer.pane) ?? { id: answer.pane, model: answer.model };
  const fresh = blank({ id: pane.id, model: answer.model });
  turn.answers[turn.answers.indexOf(answer)] = fresh;
  showTurn(turn);
  run(turn, [fresh]);
}

function stop(forget = false) {
  if (!running) return;
  running.forgotten = forget;
  running.abort();
  running = null;
  for (const turn of talk.turns) for (const answer of turn.answers) if (answer.state === "waiting") answer.state = "stopped";
  if (!forget) note(talk);
  showState();
}

// -- showing ----------------------------------------------------------------------------------------------------------------

const log = field("log"), box = field("text");
const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 80;
function scrollDown(always) { if (always) log.scrollTop = log.scrollHeight; }

// Shows an answer at the next frame, however often it changed until then.
function painter(turn, answer) {
  let due = false;
  const paint = () => {
    due = false;
    const stay = atEnd();
    view.get(answer)?.update(settings.colors);
    scrollDown(stay);
  };
  return () => {
    if (answer.state !== "waiting") paint();
    else if (!due) { due = true; requestAnimationFrame(paint); }
  };
}

function showTurn(turn) {
  const cards = turn.answers.map((answer, number) => {
    const at = settings.panes.findIndex(pane => pane.id === answer.pane);
    const made = card(answer, at < 0 ? number : at, { again: one => again(turn, one) });
    view.set(answer, made);
    made.update(settings.colors);
    return made;
  });
  const made = question(turn, cards, turn.answers.length, { edit: resend });
  const before = view.get(turn);
  before ? before.replaceWith(made) : log.append(made);
  view.set(turn, made);
  field("welcome").hidden = true;
}

function showTalk() {
  view = new Map();
  log.replaceChildren(field("welcome"));
  field("welcome").hidden = talk.turns.length > 0;
  talk.turns.forEach(showTurn);
  field("base").textContent = baseName();
  const told = one => one.split ? `A split of ${Object.keys(one.split).join(", ")}`
    : !one.parent ? "The base, without an adapter"
    : one.resident ? "An adapter, in memory" : "An adapter, loaded when it is asked";
  const shown = served.slice(0, MOST_SHOWN).map(one => element("li", {},
    button(one.id, told(one), () => choose(settings.panes.at(-1), one.id), { className: one.resident ? "resident" : "" })));
  const more = served.length - shown.length;
  field("served").replaceChildren(...shown, ...(more > 0 ? [element("li", { className: "quiet", textContent: `and ${more} more` })] : []));
  showHistory();
  scrollDown(true);
}

const baseName = () => served.find(one => !one.parent && !one.split)?.id ?? "";

function showState() {
  field("send").textContent = running ? "Stop" : "Send";
  field("send").classList.toggle("stop", !!running);
  document.body.classList.toggle("running", !!running);
}

function showHistory() {
  document.title = talk.title || [baseName(), "mlx_adapters"].filter(Boolean).join(" · ");
  field("history").replaceChildren(...store.kept().map(one => {
    const open = button(one.title || "Untitled", new Date(one.at).toLocaleString(), () => openTalk(one));
    if (one.id === talk.id) open.setAttribute("aria-current", "page");
    const remove = button("×", "Delete this conversation", () => {
      if (remove.textContent === "×") { remove.textContent = "Delete?"; setTimeout(() => { remove.textContent = "×"; }, 3000); return; }
      store.forget(one.id);
      if (one.id === talk.id) openTalk(store.newTalk(settings.system), true); else showHistory();
    }, { className: "quiet" });
    return element("li", {}, open, remove);
  }));
}

function openTalk(next, forget = false) {
  stop(forget);
  for (const turn of next.turns) for (const answer of turn.answers) if (answer.state === "waiting") answer.state = "stopped";
  talk = next;
  settings.system = next.system ?? "";
  field("system").value = settings.system;
  document.body.classList.remove("menu");
  showTalk();
  if (matchMedia("(min-width: 760px)").matches) box.focus();
}

// A line above the box, with what can be done about it.
function say(text, action) {
  field("notice").replaceChildren(text, ...(action ? [button(action[0], action[0], action[1])] : []));
  field("notice").hidden = !text;
}

// -- what is heard ----------------------------------------------------------------------------------------------------------

function fit() { box.style.height = "auto"; box.style.height = Math.min(box.scrollHeight + 2, innerHeight / 3) + "px"; }
const saveSettings = () => store.keepSettings(settings);
const openSettings = () => field("settings").showModal();

field("form").addEventListener("submit", event => {
  event.preventDefault();
  if (running) { if (event.submitter) stop(); return; }
  if (send(box.value.trim())) { box.value = ""; fit(); }
});
box.addEventListener("keydown", event => {
  if (event.isComposing || event.keyCode === 229) return;  // this Enter ends a word that an input method composes
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); field("form").requestSubmit(); }
  const last = talk.turns.at(-1);
  if (event.key === "ArrowUp" && !box.value && last && !running) { event.preventDefault(); view.get(last).edit(); }
});
box.addEventListener("input", fit);
document.addEventListener("click", event => {
  if (!event.target.closest("#side, #menu")) document.body.classList.remove("menu");
});
document.addEventListener("keydown", event => {
  if (event.isComposing || field("settings").open) return;
  if (event.key === "Escape") { if (running) stop(); else document.body.classList.remove("menu"); }
  if (event.key === "/" && !/^(TEXTAREA|INPUT|SELECT)$/.test(event.target.tagName)) { event.preventDefault(); box.focus(); }
});
for (const id of ["temperature", "top_p", "max_tokens", "seed", "thinking", "system"]) {
  field(id).value = settings[id];
  field(id).addEventListener("input", () => {
    if (!field(id).checkValidity()) return;
    settings[id] = field(id).value;
    saveSettings();
  });
}
field("colors").checked = settings.colors;
field("colors").addEventListener("change", () => {
  settings.colors = field("colors").checked;
  saveSettings();
  for (const turn of talk.turns) for (const answer of turn.answers) view.get(answer)?.update(settings.colors);
});
field("key").addEventListener("change", loadModels);
field("compare").addEventListener("click", compare);
field("new").addEventListener("click", () => openTalk(store.newTalk(settings.system)));
field("menu").addEventListener("click", () => document.body.classList.toggle("menu"));
field("open-settings").addEventListener("click", openSettings);
field("settings").addEventListener("click", event => { if (event.target === field("settings")) field("settings").close(); });
field("forget").addEventListener("click", event => {
  if (event.target.textContent !== "Sure?") { event.target.textContent = "Sure?"; return; }
  event.target.textContent = "Delete all conversations";
  store.forgetAll();
  openTalk(store.newTalk(settings.system), true);
});
addEventListener("storage", showHistory);  // another window's talks
addEventListener("pagehide", () => { if (running) store.keep(talk); });
field("examples").replaceChildren(...EXAMPLES.map(text => element("li", {}, button(text, "Ask this", () => send(text)))));

talk = store.newTalk(settings.system);
showPanes();
showTalk();
loadModels();
if (location.hash.startsWith("#ask=")) {  // a link may bring a question; whoever follows it sends it
  try { box.value = decodeURIComponent(location.hash.slice(5)); } catch { /* no text */ }
  fit();
}
