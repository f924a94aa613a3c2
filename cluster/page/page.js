"use strict";

// Asks the endpoint that served this page the same question twice, first dense, then with SPTS, one after the
// other so that neither slows the other down, and shows what that took. picture.js draws what each layer computed.

const BINS = 160;
const $ = (id) => document.getElementById(id);
const nouns = ["amber", "anchor", "basket", "candle", "cedar", "copper", "falcon", "feather", "garden", "goose",
  "hammer", "harbor", "heron", "island", "kettle", "lantern", "marble", "meadow", "needle", "orchid", "pebble", "ribbon"];
// Sentences for the example's document are put together from these, so that hardly any comes twice.
const pieces = [
  ["The committee", "A surveyor", "The engineers", "Our neighbour", "The editor", "A clerk", "The crew", "The council"],
  ["went through", "put aside", "compared", "copied out", "wrote about", "asked for", "looked at", "forgot"],
  ["the list of open points", "the plan of the northern field", "two drawings", "the older ledger", "last year's prices",
    "a letter without a date", "the minutes of the meeting", "the weather report"],
  ["in the morning", "before noon", "after the break", "late in the week", "once more", "for the third time",
    "on request", "without a word"],
];

let model = null;
const pictures = new Map(); // side -> how to draw its picture again

function api(path, options = {}) {
  const headers = { "Content-Type": "application/json", ...options.headers };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  return fetch(path, { ...options, headers });
}

function problem(text) {
  $("problem").textContent = text || "";
  $("problem").hidden = !text;
}

async function failure(response) {
  if (response.status === 401) {
    $("key-label").hidden = false;
    $("key").focus();
  }
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `the server answered ${response.status}`);
}

async function findModel() {
  const response = await api("v1/models");
  if (!response.ok) throw await failure(response);
  model = (await response.json()).data[0];
  const context = model.max_model_len ? `, reads up to ${model.max_model_len.toLocaleString("en")} tokens` : "";
  $("model").textContent = `Model ${model.id}${context}`;
}

// Streams one answer; calls `onText` as it comes. Returns its text, its usage, and the seconds to its first token.
async function ask(method, content, maxTokens, onText) {
  const started = performance.now();
  const response = await api("v1/chat/completions", {
    method: "POST",
    body: JSON.stringify({
      model: model.id, messages: [{ role: "user", content }], max_tokens: maxTokens, temperature: 0, stream: true,
      stream_options: { include_usage: true }, spts: { method, activity: BINS },
    }),
  });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let [text, rest, first, usage] = ["", "", null, null];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) usage = chunk.usage;
      if (!chunk.choices?.length) continue;
      first ??= (performance.now() - started) / 1000;
      text += chunk.choices[0].delta.content ?? "";
      onText(text);
    }
  }
  if (!usage) throw new Error("the stream ended before the answer did; the server's log says why");
  return { text, usage, first };
}

const seconds = (s) => (s < 1 ? `${Math.round(1000 * s)} ms` : `${s.toFixed(2)} s`);
const share = (x) => `${(100 * x).toFixed(x < 0.1 ? 1 : 0)} %`;
function bytes(n) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (n < 1024) return `${n < 10 && unit !== "B" ? n.toFixed(1) : Math.round(n)} ${unit}`;
    n /= 1024;
  }
  return `${n.toFixed(2)} GiB`;
}

// Where the answer's words stand in the prompt, from 0 to 1; nowhere if they stand everywhere.
function places(answer, text) {
  const words = answer.trim().toLowerCase(), all = text.toLowerCase(), found = [];
  if (words.length < 3) return found;
  for (let at = -1; (at = all.indexOf(words, at + 1)) >= 0;) {
    if (found.length === 4) return [];
    found.push(at / all.length);
  }
  return found;
}

async function answerOn(side, method, content, maxTokens) {
  const box = side.querySelector(".answer"), started = performance.now();
  const clock = setInterval(() => {
    box.textContent = `Reading … ${((performance.now() - started) / 1000).toFixed(1)} s`;
  }, 100);
  box.textContent = "Reading …";
  let answer;
  try {
    answer = await ask(method, content, maxTokens, (text) => {
      clearInterval(clock);
      box.className = "answer";
      box.textContent = text;
    });
  } finally {
    clearInterval(clock);
  }
  const { usage, text } = answer;
  if (!text.trim()) {
    box.className = "answer empty";
    box.textContent = "The model ended its answer without a word.";
  }
  side.querySelector("figure").hidden = $("legend").hidden = false;
  const shown = { activity: usage.spts.activity, promptTokens: usage.prompt_tokens, text: content, marks: places(text, content) };
  pictures.set(side, () => picture(side, shown));
  pictures.get(side)();
  return answer;
}

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

// Two bars, as long as what they stand for.
function measure(title, values, say) {
  const bars = ["dense", "spts"].map((name, i) => {
    const bar = element("i", "");
    bar.style.width = `${100 * values[i] / Math.max(...values)}%`;
    const whose = element("small", "", $(name).querySelector("h2").firstChild.textContent);
    return element("div", `bar ${name}`, whose, element("span", "", bar), element("b", "", say(values[i])));
  });
  return element("div", "measure", element("h3", "", title), ...bars);
}

function verdict(dense, spts) {
  const both = [dense, spts], of = (key) => both.map((answer) => answer.usage.spts[key]);
  const times = dense.first / spts.first, kv = 1 - of("kv_bytes")[1] / of("kv_bytes")[0];
  const same = dense.text.trim() === spts.text.trim() ? "The same answer" : "Two different answers";
  const skipped = spts.usage.spts.skipped_share > 0;
  const speed = times >= 1.05 ? `came ${times.toFixed(1)}× as fast` : "came no sooner";
  $("verdict").querySelector("h2").textContent = skipped
    ? `${same}; with SPTS the first token ${speed}, and the KV cache is ${share(kv)} smaller.`
    : "The prompt is shorter than every budget, so both sides computed everything. Try a longer document.";
  $("verdict").querySelector(".measures").replaceChildren(...(skipped ? [
    measure("Time to the first token", both.map((answer) => answer.first), seconds),
    measure("Computation to read the document", of("flops_share"), share),
    measure("Memory for what was read (KV cache)", of("kv_bytes"), bytes),
  ] : []));
  const kept = both.map((answer) => answer.usage.prompt_tokens_details.cached_tokens);
  $("verdict").querySelector("p").textContent = Math.max(...kept) === 0 ? ""
    : `Still in memory from an earlier question, and not read again: ${kept[0].toLocaleString("en")} tokens for dense, ` +
      `${kept[1].toLocaleString("en")} for SPTS. Change the document's beginning to compare both from the start.`;
  $("verdict").hidden = false;
}

function example() {
  const pick = [...nouns].sort(() => Math.random() - 0.5);
  const facts = Array.from({ length: 8 }, (_, i) => `The code of ${pick[2 * i]} is ${pick[2 * i + 1]}.`);
  // As much as the model can read, at a cautious three characters a token, but no more than a minute's reading.
  const room = 3 * (Math.min(model?.max_model_len ?? 8192, 8448) - 512) - facts.join("\n").length;
  const any = (list) => list[Math.floor(Math.random() * list.length)];
  const lines = [];
  for (let used = 0; ;) {
    const line = `${pieces.map(any).join(" ")}.`;
    used += line.length + 1;
    if (used >= room) break;
    lines.push(line);
  }
  for (const fact of facts) lines.splice(Math.floor(Math.random() * lines.length), 0, fact);
  $("document").value = lines.join("\n");
  $("question").value = `What is the code of ${pick[0]}?`;
  size();
}

function size(tokens) {
  const length = $("document").value.length;
  $("size").textContent = length ? `${length.toLocaleString("en")} characters` : "";
  if (tokens) $("size").textContent += `, ${tokens.toLocaleString("en")} tokens to read`;
}

$("ask").onsubmit = async (event) => {
  event.preventDefault();
  if ($("run").disabled) return; // it is asking already
  problem("");
  const [text, question] = [$("document").value, $("question").value.trim()];
  if (!question) return problem("Write a question first.");
  $("run").disabled = true;
  $("verdict").hidden = $("legend").hidden = true;
  pictures.clear();
  for (const side of document.querySelectorAll(".side")) {
    side.querySelector("figure").hidden = true;
    side.querySelector(".answer").className = "answer empty";
    side.querySelector(".answer").textContent = "Waits for its turn, so that neither slows the other down.";
  }
  try {
    if (!model) await findModel();
    const content = `${text}\n\nQuestion: ${question}`, maxTokens = Number($("max-tokens").value);
    const dense = await answerOn($("dense"), "dense", content, maxTokens);
    size(dense.usage.prompt_tokens);
    const spts = await answerOn($("spts"), "spts", content, maxTokens);
    verdict(dense, spts);
  } catch (error) {
    problem(error.message);
    for (const box of document.querySelectorAll(".answer.empty")) box.textContent = "No answer.";
  } finally {
    $("run").disabled = false;
  }
};
$("example").onclick = example;
$("document").oninput = () => size();
$("document").ondragover = (event) => {
  event.preventDefault();
  $("document").classList.add("over");
};
$("document").ondragleave = () => $("document").classList.remove("over");
$("document").ondrop = async (event) => {
  event.preventDefault();
  $("document").classList.remove("over");
  const file = event.dataTransfer.files[0];
  $("document").value = file ? await file.text() : event.dataTransfer.getData("text");
  size();
};

// A link to the page that ends in #example shows the example by itself.
async function start() {
  try {
    await findModel();
    problem("");
    if (location.hash !== "#example") return;
    example();
    $("ask").requestSubmit();
  } catch (error) {
    problem(error.message);
  }
}
$("key").onchange = start;
const redraw = () => pictures.forEach((draw) => draw());
onresize = redraw;
matchMedia("(prefers-color-scheme: dark)").onchange = redraw;
start();
