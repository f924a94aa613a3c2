"use strict";

// Asks the endpoint that served this page the same question twice, first dense, then with SPTS, one after the
// other so that neither slows the other down, and draws which tokens each layer computed.

const BINS = 160;
const $ = (id) => document.getElementById(id);
const nouns = ["amber", "anchor", "basket", "candle", "cedar", "copper", "falcon", "feather", "garden", "granite",
  "hammer", "harbor", "heron", "island", "kettle", "lantern", "marble", "meadow", "needle", "orchid", "pebble", "ribbon"];
const filler = [
  "The committee met in the morning and went through the list of open points once more.",
  "Nothing in this paragraph matters for the question; it is here because documents are long.",
  "Rain had been forecast, and so the survey of the northern field was moved to the following week.",
  "A second copy of the ledger is kept in the reading room, where it may be seen on request.",
  "Prices rose a little during the spring and came back to where they had been by autumn.",
  "The engineers compared the two drawings and found that they differed only in the date.",
];

let model = null;
let shown = ""; // the document of the answers on the page

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
  figure.hidden = false;
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
    pen.globalAlpha = 0.06 + 0.94 * percent / 100;
    pen.fillRect(left + bin * cell[0], layer * cell[1], Math.ceil(cell[0]), cell[1] - 1);
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
  figure.querySelector("figcaption").textContent =
    "Which parts of the prompt ran attention, layer by layer; pale = skipped. Point at a place to read it.";
  canvas.onpointermove = (event) => {
    const bin = Math.floor((event.offsetX - left) / cell[0]);
    const layer = Math.min(rows.length - 1, Math.floor(event.offsetY / cell[1]));
    if (bin < 0 || bin >= rows[0].length || layer < 0) return;
    const at = Math.floor(shown.length * bin / rows[0].length);
    $("where").textContent = `${side.id === "spts" ? "SPTS" : "dense"}, layer ${layer}: ` +
      `${rows[layer][bin]} % of the tokens here ran attention, ${activity.ffn[layer][bin]} % the FFN. About here:`;
    $("excerpt").textContent = shown.slice(at, at + Math.ceil(shown.length / rows[0].length) + 60);
    $("place").hidden = false;
  };
}

async function answerOn(side, method, content, maxTokens) {
  const box = side.querySelector(".answer");
  box.className = "answer empty";
  box.textContent = "Reading …";
  numbers(side, []);
  side.querySelector("figure").hidden = true;
  const answer = await ask(method, content, maxTokens, (text) => {
    box.className = "answer";
    box.textContent = text;
  });
  const { usage } = answer;
  numbers(side, [
    ["First token", seconds(answer.first)],
    ["Prefill FLOP", share(usage.spts.flops_share)],
    ["Token blocks computed", share(1 - usage.spts.skipped_share)],
    ["KV cache", bytes(usage.spts.kv_bytes)],
    ["Prompt", `${usage.prompt_tokens.toLocaleString("en")} tokens`],
  ]);
  if (usage.spts.activity) picture(side, usage.spts.activity, usage.prompt_tokens);
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
  const lines = [];
  for (let i = 0; i < 330; i++) lines.push(filler[i % filler.length]);
  const pick = [...nouns].sort(() => Math.random() - 0.5);
  const facts = Array.from({ length: 8 }, (_, i) => `The code of ${pick[2 * i]} is ${pick[2 * i + 1]}.`);
  for (const fact of facts) lines.splice(Math.floor(Math.random() * lines.length), 0, fact);
  // As much as the model can read, at a cautious three characters a token.
  const room = 3 * ((model?.max_model_len ?? 8192) - 512);
  const needed = new Set(facts);
  while (lines.join("\n").length > room) lines.splice(lines.findIndex((line) => !needed.has(line)), 1);
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
  problem("");
  $("verdict").hidden = $("place").hidden = true;
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
findModel().catch((error) => problem(error.message));
