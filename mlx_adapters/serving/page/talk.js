// Conversations: what was asked, what each pane answered to it, and where the browser keeps both.
//
// A talk is {id, title, at, system, turns: [{text, answers: [answer]}]}, an answer {pane, model, text, reasoning, state,
// error, tokens, usage, first, seconds}; its state is "waiting", "whole", "cut" (at the limit), "stopped" or "failed".

const TALK = "mlx_adapters.talk.", SETTINGS = "mlx_adapters.settings";

export const newTalk = system => ({ id: name(), title: "", at: Date.now(), system, turns: [] });
export const name = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8);

const counts = answer => answer.state === "whole" || answer.state === "cut" || (answer.state === "stopped" && answer.text);

// What pane `pane` is sent for the turn at `index`: a pane that was not there before goes on from the first one's answers.
export function messages(talk, index, pane) {
  const sent = talk.system.trim() ? [{ role: "system", content: talk.system }] : [];
  for (const turn of talk.turns.slice(0, index)) {
    const answer = turn.answers.find(one => one.pane === pane) ?? turn.answers[0];
    if (answer && counts(answer))
      sent.push({ role: "user", content: turn.text }, { role: "assistant", content: answer.text });
  }
  return [...sent, { role: "user", content: talk.turns[index].text }];
}

// The tokens of an answer with the text that each brought: a character may be spread over several, which then are one.
export function spans(answer) {
  const whole = (answer.reasoning ?? "") + answer.text, found = [];
  let at = 0, broken = [];
  const close = end => {
    const between = whole.slice(at, end), fits = between && between.length <= 2 * broken.length;
    if (broken.length) found.push({ ...broken[0], text: fits ? between : broken.map(one => one.text).join(""),
                                    logprob: broken.reduce((sum, one) => sum + one.logprob, 0) });
    broken = [];
  };
  for (const token of answer.tokens ?? []) {
    if (token.text.includes("\ufffd") && !whole.startsWith(token.text, at)) { broken.push(token); continue; }
    if (broken.length) {
      const next = token.text ? whole.indexOf(token.text, at) : -1;
      close(next < 0 ? at : next);
      if (next >= 0) at = next;
    }
    found.push(token);
    if (whole.startsWith(token.text, at)) at += token.text.length;
  }
  close(whole.length);
  return found;
}

// -- what the browser keeps: each talk by itself, so that two windows do not overwrite each other's -------------------

const store = (() => {
  try { localStorage.setItem(SETTINGS + "?", ""); localStorage.removeItem(SETTINGS + "?"); return localStorage; }
  catch { return null; }
})();

const read = key => { try { return JSON.parse(store.getItem(key)); } catch { return null; } };
const keys = () => store ? Object.keys(store).filter(key => key.startsWith(TALK)) : [];

// What another version or another program wrote under these names is left alone.
const text = value => typeof value === "string";
const isAnswer = one => text(one?.text) && text(one.model) && text(one.state);
const isTurn = turn => text(turn?.text) && Array.isArray(turn.answers) && turn.answers.every(isAnswer);
const isTalk = talk => text(talk?.title) && text(talk.system) && Array.isArray(talk.turns) && talk.turns.every(isTurn);

export const kept = () => keys().map(read).filter(isTalk).sort((a, b) => b.at - a.at);

// Whether the browser could keep it: with the probabilities of its tokens, or where there is no room for them without.
export function keep(talk) {
  if (!store || !talk.turns.length) return !!store;
  const lean = ({ text, logprob }) => ({ text, logprob });
  for (const tokens of [answer => answer.tokens?.map(lean), () => []]) {
    const answers = turn => turn.answers.map(answer => ({ ...answer, tokens: tokens(answer) }));
    const turns = talk.turns.map(turn => ({ ...turn, answers: answers(turn) }));
    try { store.setItem(TALK + talk.id, JSON.stringify({ ...talk, turns })); return true; } catch { /* full */ }
  }
  return false;
}

export const forget = id => store?.removeItem(TALK + id);
export const forgetAll = () => keys().forEach(key => store.removeItem(key));
export const keptSettings = () => (store && read(SETTINGS)) || {};
export const keepSettings = settings => { try { store?.setItem(SETTINGS, JSON.stringify(settings)); } catch { /* full */ } };
