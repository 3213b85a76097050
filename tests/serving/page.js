// The page of `serve` without a browser: `node page.js PAGE.html` plays what a user does and prints what comes of it.
"use strict";
const script = require("fs").readFileSync(process.argv[2], "utf8").match(/<script>([\s\S]*)<\/script>/)[1];

class Element {
  constructor() { Object.assign(this, { children: [], heard: {}, value: "", textContent: "", disabled: false, inner: {} }); }
  append(child) { this.children.push(child); }
  replaceChildren(...children) { this.children = children; if (children[0]) this.value = children[0].value; }
  querySelector(selector) { return this.inner[selector] ??= new Element(); }
  addEventListener(name, listener) { this.heard[name] = listener; }
  fire(name, more = {}) { return this.heard[name]({ preventDefault() {}, ...more }); }
  requestSubmit() { this.fire("submit"); }
}
const ids = {}, form = new Element(), asked = [];
const box = form.querySelector("textarea"), send = form.querySelector("button");
const document = {
  getElementById: id => ids[id] ??= new Element(),
  querySelector: () => form,
  createElement: () => new Element(),
};

function fetch(url, options) {
  if (url.endsWith("models")) return Promise.resolve({ ok: true, json: async () => ({ data: [{ id: "base" }, { id: "a" }, { id: "b" }] }) });
  const stream = new TransformStream(), writer = stream.writable.getWriter();
  const write = text => writer.write(new TextEncoder().encode(text)).catch(() => {});
  const request = {
    messages: JSON.parse(options.body).messages, ended: false,
    say: text => write(`data: ${JSON.stringify({ choices: [{ delta: { content: text } }] })}\n\n`),
    end: () => { write("data: [DONE]\n\n"); writer.close().catch(() => {}); },
    lose: () => writer.close().catch(() => {}),
  };
  options.signal?.addEventListener("abort", () => { request.ended = true; writer.abort(options.signal.reason).catch(() => {}); });
  asked.push(request);
  return Promise.resolve({ ok: true, body: stream.readable });
}
const settle = () => new Promise(done => setTimeout(done, 30));
const type = async text => { box.value = text; box.fire("keydown", { key: "Enter", shiftKey: false }); await settle(); };
const answer = async (requests, text) => { for (const r of requests) { r.say(text); r.end(); } await settle(); };
const shown = side => ids[side].inner[".log"].children.map(p => `${p.className}: ${p.textContent}`);

async function main() {
  new Function("document", "fetch", "location", "Option", "performance", script)(
    document, fetch, { hash: "" }, class { constructor(name) { this.value = name; } }, performance);
  await settle();
  const seen = {};

  await type("one");
  await type("two");  // Send is disabled: it has to wait, and is not lost
  seen.requestsWhileBusy = asked.length;
  seen.kept = box.value;
  await answer(asked.slice(0, 2), "first");
  seen.enabledAfterwards = !send.disabled;
  box.fire("keydown", { key: "Enter", shiftKey: false });
  await settle();
  seen.second = asked[2].messages.map(m => m.content);

  await asked[2].say("half");
  await settle();
  ids.clear.fire("click");
  seen.endedByClear = asked.slice(2, 4).map(r => r.ended);
  seen.enabledByClear = !send.disabled;
  await answer(asked.slice(2, 4), "late");
  seen.afterClear = [...shown("left"), ...shown("right")];
  seen.note = ids.left.inner.small.textContent;
  await type("three");
  seen.third = asked[4].messages.map(m => m.content);
  seen.disabledAgain = send.disabled;
  await answer(asked.slice(4, 6), "fresh");
  seen.shown = shown("left");

  await type("four");
  asked[6].say("cut");
  asked[6].lose();
  await answer([asked[7]], "whole");
  seen.lost = shown("left").at(-1);
  await type("five");
  seen.fifth = [asked[8].messages.map(m => m.content), asked[9].messages.map(m => m.content)];
  console.log(JSON.stringify(seen));
  process.exit(0);
}
main();
