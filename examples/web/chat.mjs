/**
 * A page that talks with a language model: the words appear as they are written.
 *
 * The model runs in a worker (chat_worker.mjs), so that the page stays alive meanwhile. After
 * every answer the document gets the event "answered": text, tokens, reason, seconds (first: those
 * to the first piece), and how many pieces came, in its detail; or the error. ?max_new_tokens=N in
 * the page's address: of an answer, 512 if it says nothing.
 */

const [conversation, form, prompt, send, stop, status, facts] = [
  "conversation", "form", "prompt", "send", "stop", "status", "facts",
].map((id) => document.getElementById(id));
const asked = new URLSearchParams(location.search).get("max_new_tokens");
const longest = Number(asked ?? 512); // tokens of an answer
const messages = []; // of the conversation so far
let answer = null; // {item, text, pieces} while one is written

const worker = new Worker("chat_worker.mjs", { type: "module" });
const heard = {
  ready({ about }) {
    facts.textContent = about;
    status.textContent = "Ready";
    document.body.dataset.state = "ready";
    allow(true);
  },
  piece({ text }) {
    answer.text += text;
    answer.pieces += 1;
    answer.item.textContent = answer.text;
    answer.item.scrollIntoView({ block: "nearest" });
  },
  end({ tokens, reason, seconds, first }) {
    messages.push({ role: "assistant", content: answer.text });
    const speed = (tokens.length - 1) / (seconds - first);
    status.textContent =
      `${tokens.length} tokens, the first after ${first.toFixed(1)} s` +
      (tokens.length > 1 ? `, then ${speed.toFixed(1)} a second` : "");
    allow(true);
    const { text, pieces } = answer;
    answer = null;
    tell({ text, tokens, reason, seconds, first, pieces });
  },
  failed({ message, fatal }) {
    status.textContent = message;
    if (fatal) document.body.dataset.state = "failed";
    else allow(true);
    if (!answer) return;
    answer.item.remove();
    answer = null;
    messages.pop(); // what was asked
    tell({ error: message });
  },
};
worker.addEventListener("message", ({ data }) => heard[data.kind](data));
worker.addEventListener("error", ({ message }) => heard.failed({ message, fatal: true }));

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (!text || send.disabled) return;
  prompt.value = "";
  show("user", text);
  messages.push({ role: "user", content: text });
  answer = { item: show("assistant", "…"), text: "", pieces: 0 };
  status.textContent = "Reading …";
  allow(false);
  worker.postMessage({ kind: "ask", messages, longest });
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    form.requestSubmit();
  }
});
stop.addEventListener("click", () => worker.postMessage({ kind: "stop" }));

function tell(detail) {
  document.dispatchEvent(new CustomEvent("answered", { detail }));
}

function allow(asking) {
  send.disabled = !asking;
  stop.disabled = asking;
}

function show(role, text) {
  const item = document.createElement("li");
  item.className = role;
  item.textContent = text;
  conversation.append(item);
  item.scrollIntoView({ block: "nearest" });
  return item;
}
