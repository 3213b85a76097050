// Put into the page of `serve` by its test: answers come when the test says so, and `asked` holds what was asked for.
window.asked = [];
const real = window.fetch;
window.fetch = (url, options) => {
  if (!String(url).endsWith("completions")) return real(url, options);
  const stream = new TransformStream(), writer = stream.writable.getWriter();
  const bytes = text => writer.write(typeof text === "string" ? new TextEncoder().encode(text) : text).catch(() => {});
  const event = data => bytes(`data: ${JSON.stringify(data)}\n\n`);
  const request = {
    ...JSON.parse(options.body), key: options.headers.Authorization ?? null, ended: false, bytes,
    say: (content, more = {}) => event({ choices: [{ delta: { content }, finish_reason: null, ...more }] }),
    think: (text, more = {}) => event({ choices: [{ delta: { reasoning_content: text }, finish_reason: null, ...more }] }),
    end: (reason = "stop", tokens = 3) => {
      event({ choices: [{ delta: {}, finish_reason: reason }] });
      event({ choices: [], usage: { prompt_tokens: 5, completion_tokens: tokens } });
      bytes("data: [DONE]\n\n");
      writer.close().catch(() => {});
    },
    lose: () => writer.close().catch(() => {}),
  };
  options.signal.addEventListener("abort", () => { request.ended = true; writer.abort(options.signal.reason).catch(() => {}); });
  asked.push(request);
  if (window.refusal) return Promise.resolve(window.refusal);
  return Promise.resolve(new Response(stream.readable));
};
window.answer = (requests, text) => { for (const one of requests) { one.say(text); one.end(); } };
window.busy = () => document.body.classList.contains("running");
window.texts = selector => [...document.querySelectorAll(selector)].map(element => element.innerText.trim());
window.press = text => [...document.querySelectorAll("button")].filter(one => one.textContent === text && one.offsetParent).at(-1).click();
true
