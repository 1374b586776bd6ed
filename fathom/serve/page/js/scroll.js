/** Keeps the end of a growing text in sight, unless the reader has scrolled up. */

const NEAR = 60; // px from the end that still count as being there

export class Scroller {
  #following = true;

  /** @param {HTMLElement} button brings the reader back to the end */
  constructor(area, button) {
    this.area = area;
    this.button = button;
    area.addEventListener("scroll", () => this.#look(), { passive: true });
    // Upwards is a wish to leave, even when it is a few pixels only and text is pouring in.
    area.addEventListener("wheel", ({ deltaY }) => deltaY < 0 && this.#leave(), { passive: true });
    button.addEventListener("click", () => this.toEnd());
    new ResizeObserver(() => this.follow()).observe(area);
  }

  get #distance() {
    return this.area.scrollHeight - this.area.scrollTop - this.area.clientHeight;
  }

  #look() {
    const before = this.last ?? 0;
    this.last = this.area.scrollTop;
    if (this.#distance < NEAR) this.#following = true;
    else if (this.last < before) this.#leave();
    this.button.hidden = this.#distance < NEAR * 2;
  }

  #leave() {
    if (this.area.scrollHeight > this.area.clientHeight) this.#following = false;
  }

  /** The text has grown. */
  follow() {
    if (this.#following) this.area.scrollTop = this.area.scrollHeight;
    else this.button.hidden = this.#distance < NEAR * 2;
  }

  toEnd() {
    this.#following = true;
    this.follow();
  }
}
