/**
 * Text that grows, shown as Markdown.
 *
 * Only the last top-level block of a text can still change, so only that is parsed and built again; the blocks before it
 * are settled and their elements stay. Drawing happens at animation frames, and less often where a frame's work is long.
 */

import { build, parse } from "./markdown.js";

const PLAIN_WHILE_GROWING = 8_000; // characters of code after which highlighting waits for the block's end
const DEFINITION = /^[ >*+-]{0,9}\[[^\]\n]{1,999}\]:/m;
const REST = 4; // after work of t ms, wait at least 4 t before the next

export class LiveMarkdown {
  /** @param {HTMLElement} container filled with the elements of the text. */
  constructor(container) {
    this.container = container;
    this.text = "";
    this.onDraw = () => {};
    this.#reset();
  }

  #reset() {
    this.container.replaceChildren();
    this.streaming = true;
    this.settled = 0; // everything before this place in the text has its final elements
    this.tail = []; // elements of what comes after
    this.frame = 0;
    this.notBefore = 0;
  }

  /** Show the whole of `text` at once. */
  set(text) {
    cancelAnimationFrame(this.frame);
    this.#reset();
    this.text = text.replaceAll("\r", "");
    this.finish();
  }

  /** Begin with `text`, to which more will be added. */
  restart(text) {
    cancelAnimationFrame(this.frame);
    this.#reset();
    this.text = "";
    if (text) this.push(text);
  }

  /** Add `text` at the end and draw it at one of the next frames. */
  push(text) {
    this.text += text.replaceAll("\r", ""); // to Markdown a lone one would be a line, to our offsets not
    this.#schedule();
  }

  #schedule() {
    this.frame ||= requestAnimationFrame((now) => {
      this.frame = 0;
      if (now < this.notBefore) return this.#schedule();
      const started = performance.now();
      this.#draw();
      this.notBefore = started + (performance.now() - started) * REST;
      this.onDraw();
    });
  }

  /** The text is complete: draw what is left. */
  finish() {
    if (!this.streaming) return;
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.streaming = false;
    // A link's definition may stand below the text that uses it, so only the whole text says what its parts are.
    if (DEFINITION.test(this.text)) {
      this.container.replaceChildren();
      this.settled = 0;
      this.tail = [];
    }
    this.#draw();
    this.onDraw();
  }

  #draw() {
    const rest = this.text.slice(this.settled);
    const blocks = topLevelBlocks(parse(rest, { streaming: this.streaming }));
    for (const node of this.tail) node.remove();
    this.tail = [];
    const last = this.streaming ? blocks.pop() : undefined;
    for (const block of blocks) this.container.append(build(block));
    if (!last) return;
    this.settled += offsetOfLine(rest, last[0].map[0]);
    const fragment = build(last, { highlight: this.text.length - this.settled < PLAIN_WHILE_GROWING });
    this.tail = [...fragment.childNodes];
    this.container.append(fragment);
  }
}

/** Tokens, a list for each block that stands in no other. */
function topLevelBlocks(tokens) {
  const blocks = [];
  let depth = 0;
  for (const token of tokens) {
    if (depth === 0) blocks.push([]);
    blocks.at(-1).push(token);
    depth += token.nesting;
  }
  return blocks;
}

function offsetOfLine(text, line) {
  let offset = 0;
  for (let count = 0; count < line; count += 1) offset = text.indexOf("\n", offset) + 1;
  return offset;
}
