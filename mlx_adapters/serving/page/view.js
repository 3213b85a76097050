// What is seen: elements are built, never written as HTML; what a model wrote as Markdown goes through DOMPurify.

import { spans } from "./talk.js";

export function element(tag, options = {}, ...children) {
  const made = document.createElement(tag), { on = {}, data = {}, ...rest } = options;
  for (const [key, value] of Object.entries(rest)) key in made ? made[key] = value : made.setAttribute(key, value);
  for (const [key, listener] of Object.entries(on)) made.addEventListener(key, listener);
  Object.assign(made.dataset, data);
  made.append(...children.filter(child => child != null && child !== false));
  return made;
}

export const button = (text, title, click, more = {}) =>
  element("button", { type: "button", textContent: text, title, on: { click }, ...more });

export async function copy(text, at) {
  try { await navigator.clipboard.writeText(text); }
  catch {  // a page that came over plain HTTP has no clipboard
    const box = element("textarea", { value: text });
    document.body.append(box); box.select(); document.execCommand("copy"); box.remove();
  }
  const said = at.textContent;
  at.textContent = "Copied";
  setTimeout(() => { at.textContent = said; }, 1200);
}

// -- Markdown -----------------------------------------------------------------------------------------------------------

const TAGS = ("p br hr h1 h2 h3 h4 h5 h6 strong em del code pre blockquote ul ol li table thead tbody tr th td a").split(" ");
const escaped = text => text.replace(/[&<>"']/g, sign => `&#${sign.charCodeAt(0)};`);
const { marked, DOMPurify } = window;

marked?.use({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escaped(text),  // shown as it was written
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,  // nothing is loaded from elsewhere
    checkbox: ({ checked }) => checked ? "☑ " : "☐ ",
  },
});

function nodes(tokens, links) {
  const list = Object.assign(tokens, { links });
  const made = DOMPurify.sanitize(marked.parser(list), {
    RETURN_DOM_FRAGMENT: true, ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ["href", "title", "align", "start", "class"],
    ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  });
  for (const link of made.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  for (const code of made.querySelectorAll("pre > code")) {
    const language = /language-(\S+)/.exec(code.className)?.[1] ?? "";
    const bar = element("div", { className: "code-bar" }, element("span", { textContent: language }),
                        button("Copy", "Copy this code", event => copy(code.textContent, event.target)));
    code.parentElement.before(bar);
  }
  for (const table of made.querySelectorAll("table")) {
    const frame = element("div", { className: "wide" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return made;
}

// Blocks that are the same as before stay, so that what is selected in them stays selected while more is written.
export function markdown(box, text) {
  if (!marked || !DOMPurify?.isSupported) { box.textContent = text; return; }
  const tokens = marked.lexer(text), shown = box.shown ??= [];
  tokens.forEach((token, i) => {
    if (shown[i]?.raw === token.raw) return;
    const block = element("div", { className: "block" }, nodes([token], tokens.links));
    shown[i] ? shown[i].block.replaceWith(block) : box.append(block);
    shown[i] = { raw: token.raw, block };
  });
  shown.splice(tokens.length).forEach(({ block }) => block.remove());
}

// -- answers -------------------------------------------------------------------------------------------------------------

const percent = logprob => `${(100 * Math.exp(logprob)).toFixed(1)} %`;

// Tokens that are there already stay: an answer may have thousands.
function colored(box, answer) {
  const found = spans(answer), shown = box.shown ?? [];
  let same = 0;
  while (same < shown.length && same < found.length && shown[same].text === found[same].text) same++;
  while (box.children.length > same) box.lastChild.remove();
  box.shown = found;
  box.append(...found.slice(same).map(token => {
    const others = (token.top ?? []).map(one => `${percent(one.logprob)}  ${JSON.stringify(one.text)}`).join("\n");
    const title = `${JSON.stringify(token.text)}: ${percent(token.logprob)}${others && "\nlikeliest:\n" + others}`;
    const span = element("span", { textContent: token.text, title });
    span.style.setProperty("--p", Math.exp(token.logprob).toFixed(3));
    return span;
  }));
}

export function figures(answer) {
  const { usage, first, seconds, tokens } = answer, told = [];
  const made = usage?.completion_tokens;
  if (made != null) told.push(`${made} token${made === 1 ? "" : "s"}`);
  if (made > 1 && seconds > first) told.push(`${((made - 1) / (seconds - first)).toFixed(1)} tok/s`);
  if (first != null) told.push(`first after ${first.toFixed(2)} s`);
  if (tokens?.length) {
    const mean = tokens.reduce((sum, token) => sum + token.logprob, 0) / tokens.length;
    told.push(`perplexity ${Math.exp(-mean).toFixed(2)}`);
  }
  return told.join(" · ");
}

const NOTES = { cut: "stopped at the most tokens", stopped: "stopped" };

// An answer's card; `update` shows what has come since.
export function card(answer, number, actions) {
  const name = element("strong", { textContent: answer.model, title: answer.model });
  const note = element("em", {});
  const thought = element("div", { className: "thought" });
  const thoughts = element("details", { hidden: true }, element("summary", { textContent: "Reasoning" }), thought);
  const text = element("div", { className: "text" }), tokens = element("div", { className: "tokens", hidden: true });
  const error = element("p", { className: "error", hidden: true, role: "alert" });
  const told = element("small", { className: "figures" });
  const copying = button("Copy", "Copy this answer", event => copy(answer.text, event.target));
  const again = button("Again", "Answer once more", () => actions.again(answer));
  const foot = element("footer", {}, told, copying, again);
  const made = element("article", { className: "answer", data: { pane: number } },
                       element("header", {}, element("i", { ariaHidden: true }), name, note), thoughts, text, tokens, error, foot);
  made.update = colors => {
    const waiting = answer.state === "waiting", color = colors && answer.tokens?.length > 0;
    made.ariaBusy = String(waiting);
    made.classList.toggle("empty", waiting && !answer.text && !answer.reasoning);
    note.textContent = NOTES[answer.state] ?? "";
    thoughts.hidden = color || !answer.reasoning;
    if (answer.reasoning) markdown(thought, answer.reasoning);
    if (waiting) thoughts.open = !answer.text;
    else if (made.was === "waiting") thoughts.open = false;
    text.hidden = color || answer.state === "failed" && !answer.text;
    tokens.hidden = !color;
    if (color) colored(tokens, answer);
    else markdown(text, answer.text);
    error.hidden = answer.state !== "failed";
    error.textContent = answer.error ?? "";
    told.textContent = waiting ? "" : figures(answer);
    const cached = answer.usage?.prompt_tokens_details?.cached_tokens;
    told.title = answer.usage ? `${answer.usage.prompt_tokens} tokens of prompt${cached ? `, ${cached} from the cache` : ""}` : "";
    copying.hidden = again.hidden = waiting;
    made.was = answer.state;
  };
  return made;
}

// A question with its answers. Edited, it is asked anew, and what came after it goes.
export function question(turn, cards, count, actions) {
  const said = element("p", { className: "said", textContent: turn.text });
  const tools = element("div", { className: "tools" },
    button("Copy", "Copy this question", event => copy(turn.text, event.target)),
    button("Edit", "Change this question and ask it again", () => edit()));
  const asked = element("div", { className: "question" }, said, tools);
  const answers = element("div", { className: "answers" }, ...cards);
  answers.style.setProperty("--n", count);
  function edit() {
    const box = element("textarea", { value: turn.text, rows: 3, ariaLabel: "Question" });
    const form = element("form", { className: "editing" }, box, element("div", { className: "tools" },
      button("Cancel", "Leave it as it was", close), element("button", { textContent: "Ask again", className: "main" })));
    function close() { form.replaceWith(asked); }
    form.addEventListener("submit", event => {
      event.preventDefault();
      if (box.value.trim() && actions.edit(turn, box.value.trim())) close();
    });
    box.addEventListener("keydown", event => {
      if (event.isComposing || event.keyCode === 229) return;
      if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); form.requestSubmit(); }
      if (event.key === "Escape") { event.preventDefault(); event.stopPropagation(); close(); }
    });
    asked.replaceWith(form);
    box.focus();
  }
  const made = element("section", { className: "turn" }, asked, answers);
  made.edit = edit;
  return made;
}
