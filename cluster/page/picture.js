"use strict";

// What each layer computed: a row per layer, the first on top; a column per part of the prompt. Full colour: every
// token there ran attention. On the right, the share of the prompt's tokens that did.

const LEFT = 34, RIGHT = 46, BELOW = 34;

// marks: where in the prompt, from 0 to 1, the answer's words stand.
function picture(side, { activity, promptTokens, text, marks }) {
  const figure = side.querySelector("figure"), canvas = figure.querySelector("canvas");
  const scale = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * scale;
  canvas.height = canvas.clientHeight * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const width = canvas.clientWidth - LEFT - RIGHT, height = canvas.clientHeight - BELOW;
  const rows = activity.attention, cell = [width / rows[0].length, height / rows.length];
  const colour = (name) => getComputedStyle(side).getPropertyValue(name);
  pen.fillStyle = colour(side.id === "spts" ? "--spts" : "--dense");
  rows.forEach((row, layer) => row.forEach((percent, bin) => {
    // Whole device pixels: columns that overlapped or left a gap would show as stripes.
    const [from, to] = [bin, bin + 1].map((edge) => Math.round((LEFT + edge * cell[0]) * scale) / scale);
    pen.globalAlpha = 0.06 + 0.94 * (percent / 100) ** 0.75; // a few tokens of a part are seen too
    pen.fillRect(from, layer * cell[1], to - from, cell[1] - 1);
  }));
  pen.globalAlpha = 1;
  pen.font = "11px system-ui, sans-serif";
  const shares = rows.map((row) => Math.round(row.reduce((sum, percent) => sum + percent, 0) / row.length));
  const every = Math.ceil(13 / cell[1]); // so many rows between two labels
  rows.forEach((_, layer) => {
    if (layer % every) return;
    const middle = (layer + 0.5) * cell[1] + 3;
    pen.fillStyle = colour("--faint");
    pen.textAlign = "right";
    pen.fillText(layer + 1, LEFT - 6, middle);
    pen.fillStyle = colour("--ink");
    pen.fillText(`${shares[layer]} %`, LEFT + width + RIGHT - 2, middle);
  });
  pen.fillStyle = colour("--faint");
  pen.save();
  pen.translate(9, height / 2);
  pen.rotate(-Math.PI / 2);
  pen.textAlign = "center";
  pen.fillText("layer", 0, 0);
  pen.restore();
  pen.textAlign = "left";
  pen.fillText("first token", LEFT, height + 28);
  pen.textAlign = "right";
  pen.fillText(`token ${promptTokens.toLocaleString("en")}`, LEFT + width, height + 28);
  pen.fillStyle = colour("--mark");
  for (const mark of marks) {
    const x = LEFT + mark * width;
    pen.beginPath();
    pen.moveTo(x, height + 2);
    pen.lineTo(x - 5, height + 11);
    pen.lineTo(x + 5, height + 11);
    pen.fill();
  }
  canvas.ariaLabel = `Share of the tokens that ran attention, from the first layer to the last: ${shares.join(", ")} per cent`;

  const caption = figure.querySelector("figcaption");
  canvas.onpointerleave = () => {
    caption.textContent = "Point at a place to read it.";
  };
  canvas.onpointerleave();
  canvas.onpointermove = (event) => {
    const bin = Math.floor((event.offsetX - LEFT) / cell[0]);
    const layer = Math.min(rows.length - 1, Math.floor(event.offsetY / cell[1]));
    if (bin < 0 || bin >= rows[0].length || layer < 0) return;
    const at = Math.floor(text.length * bin / rows[0].length);
    const excerpt = document.createElement("q");
    excerpt.textContent = text.slice(at, at + Math.ceil(text.length / rows[0].length) + 60);
    caption.replaceChildren(`Layer ${layer + 1}: ${rows[layer][bin]} % of the tokens here ran attention, ` +
      `${activity.ffn[layer][bin]} % the FFN. About here: `, excerpt);
  };
}
