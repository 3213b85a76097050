// Questions to the server: which models there are, and one answer as it is written.

export class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

const headers = key => ({ "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) });

async function refusal(answer) {
  const text = await answer.text();
  try { return new Refused(answer.status, JSON.parse(text).error.message); }
  catch { return new Refused(answer.status, `${answer.status} ${answer.statusText}`.trim()); }  // a proxy's, not the server's
}

export async function models(key) {
  const answer = await fetch("v1/models", { headers: headers(key) });
  if (!answer.ok) throw await refusal(answer);
  return (await answer.json()).data;
}

// The data of server-sent events; lines that begin with a colon say nothing but that somebody is there.
async function* events(body) {
  let rest = "";
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

// Fill `answer` with what the server writes; `changed` is called whenever there is more. Throws if it is refused or lost.
export async function ask(answer, body, key, signal, changed) {
  const start = performance.now();
  let last = start, whole = false;
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(key), signal,
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  if (!response.ok) throw await refusal(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") { whole = true; break; }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(0, chunk.error.message);
    if (chunk.usage) answer.usage = chunk.usage;
    const choice = chunk.choices[0];
    if (!choice) continue;
    const { content, reasoning_content: reasoning } = choice.delta;
    if (content || reasoning) {
      last = performance.now();
      answer.first ??= (last - start) / 1000;
      answer.text += content ?? "";
      answer.reasoning += reasoning ?? "";
    }
    for (const token of [...(choice.logprobs?.reasoning_content ?? []), ...(choice.logprobs?.content ?? [])])
      answer.tokens.push({ text: token.token, logprob: token.logprob,
                           top: token.top_logprobs.map(one => ({ text: one.token, logprob: one.logprob })) });
    if (choice.finish_reason) answer.state = choice.finish_reason === "length" ? "cut" : "whole";
    answer.seconds = (last - start) / 1000;
    changed();
  }
  if (!whole) throw new Error("The connection was lost.");
}
