"use strict";

// Asks the endpoint that served this page the same question twice, first dense, then with SPTS, one after the
// other so that neither slows the other down, and draws which tokens each layer computed.

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
let shown = ""; // the document of the answers on the page
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

function numbers(side, pairs) {
  side.querySelector(".numbers").replaceChildren(...pairs.map(([name, value]) => {
    const [box, term, description] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
    term.textContent = name;
    description.textContent = value;
    box.append(term, description);
    return box;
  }));
}

// A row per layer, the first on top; a column per part of the prompt. Full colour: every token there ran attention.
function picture(side, activity, promptTokens) {
  const figure = side.querySelector("figure"), canvas = figure.querySelector("canvas");
  const scale = window.devicePixelRatio || 1, left = 34, bottom = 18;
  canvas.width = canvas.clientWidth * scale;
  canvas.height = canvas.clientHeight * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const width = canvas.clientWidth - left, height = canvas.clientHeight - bottom;
  const rows = activity.attention, cell = [width / rows[0].length, height / rows.length];
  const style = getComputedStyle(side);
  pen.fillStyle = style.getPropertyValue(side.id === "spts" ? "--spts" : "--dense");
  rows.forEach((row, layer) => row.forEach((percent, bin) => {
    // Whole device pixels: columns that overlapped or left a gap would show as stripes.
    const [from, to] = [bin, bin + 1].map((edge) => Math.round((left + edge * cell[0]) * scale) / scale);
    pen.globalAlpha = 0.06 + 0.94 * percent / 100;
    pen.fillRect(from, layer * cell[1], to - from, cell[1] - 1);
  }));
  pen.globalAlpha = 1;
  pen.fillStyle = style.getPropertyValue("--faint");
  pen.font = "11px system-ui, sans-serif";
  pen.textAlign = "right";
  for (const layer of [0, Math.floor(rows.length / 2), rows.length - 1]) {
    pen.fillText(layer, left - 6, (layer + 0.5) * cell[1] + 4);
  }
  pen.save();
  pen.translate(9, height / 2);
  pen.rotate(-Math.PI / 2);
  pen.textAlign = "center";
  pen.fillText("layer", 0, 0);
  pen.restore();
  pen.fillText("token 0", left + 40, height + 14);
  pen.fillText(promptTokens.toLocaleString("en"), left + width, height + 14);
  const caption = figure.querySelector("figcaption");
  canvas.onpointerleave = () => {
    caption.textContent =
      "Which parts of the prompt ran attention, layer by layer; pale = skipped. Point at a place to read it.";
  };
  canvas.onpointerleave();
  canvas.onpointermove = (event) => {
    const bin = Math.floor((event.offsetX - left) / cell[0]);
    const layer = Math.min(rows.length - 1, Math.floor(event.offsetY / cell[1]));
    if (bin < 0 || bin >= rows[0].length || layer < 0) return;
    const at = Math.floor(shown.length * bin / rows[0].length);
    const excerpt = document.createElement("q");
    excerpt.textContent = shown.slice(at, at + Math.ceil(shown.length / rows[0].length) + 60);
    caption.replaceChildren(`Layer ${layer}: ${rows[layer][bin]} % of the tokens here ran attention, ` +
      `${activity.ffn[layer][bin]} % the FFN. About here: `, excerpt);
  };
}

async function answerOn(side, method, content, maxTokens) {
  const box = side.querySelector(".answer");
  box.className = "answer empty";
  box.textContent = "Reading …";
  numbers(side, []);
  side.querySelector("figure").hidden = true;
  pictures.delete(side);
  const answer = await ask(method, content, maxTokens, (text) => {
    box.className = "answer";
    box.textContent = text;
  });
  const { usage } = answer, cached = usage.prompt_tokens_details.cached_tokens;
  numbers(side, [
    ["First token", seconds(answer.first)],
    ["Prefill FLOP", share(usage.spts.flops_share)],
    ["Token blocks computed", share(1 - usage.spts.skipped_share)],
    ["KV cache", bytes(usage.spts.kv_bytes)],
    ["Prompt", `${usage.prompt_tokens.toLocaleString("en")} tokens`],
    ...(cached ? [["Kept from before", `${cached.toLocaleString("en")} tokens`]] : []),
  ]);
  side.querySelector("figure").hidden = false;
  pictures.set(side, () => picture(side, usage.spts.activity, usage.prompt_tokens));
  pictures.get(side)();
  return answer;
}

function verdict(dense, spts) {
  const times = (dense.first / spts.first).toFixed(1);
  const kv = 1 - spts.usage.spts.kv_bytes / dense.usage.spts.kv_bytes;
  const same = dense.text.trim() === spts.text.trim() ? "The same answer" : "Two different answers";
  $("verdict").textContent = spts.usage.spts.skipped_share === 0
    ? "The prompt is shorter than every budget, so both sides computed everything. Try a longer document."
    : `${same}; with SPTS the first token came ${times}× as fast, and the KV cache is ${share(kv)} smaller.`;
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

function size() {
  const length = $("document").value.length;
  $("size").textContent = length ? `${length.toLocaleString("en")} characters` : "";
}

$("ask").onsubmit = async (event) => {
  event.preventDefault();
  if ($("run").disabled) return; // it is asking already
  problem("");
  $("verdict").hidden = true;
  const [text, question] = [$("document").value, $("question").value.trim()];
  if (!question) return problem("Write a question first.");
  $("run").disabled = true;
  try {
    if (!model) await findModel();
    shown = `${text}\n\nQuestion: ${question}`;
    const maxTokens = Number($("max-tokens").value);
    const dense = await answerOn($("dense"), "dense", shown, maxTokens);
    const spts = await answerOn($("spts"), "spts", shown, maxTokens);
    verdict(dense, spts);
  } catch (error) {
    problem(error.message);
    for (const box of document.querySelectorAll(".answer.empty")) box.textContent = "No answer.";
  } finally {
    $("run").disabled = false;
  }
};
$("example").onclick = example;
$("document").oninput = size;
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
