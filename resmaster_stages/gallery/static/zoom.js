// Low-res and high-res image of one sample, with the same zoom and place in both, from tiles. OpenSeadragon draws them.

import {tile} from './api.js';

const TILE_PX = 512;  // as the server cuts them
const LARGEST_PIXEL = 16;  // device px that a px of the high-res image may take

// OpenSeadragon adds an inline style unless it finds its mark, and the page's policy forbids inline styles. sample.css
// holds the rule. An element of no language carries the mark, because browsers check real style elements.
const styled = document.createElementNS('urn:resmaster', 'style');
styled.setAttribute('data-openseadragon-mobile-css', 'true');
document.head.append(styled);

/** A tile source over the pyramid of one image. Levels below a single tile are left out. */
function pyramid(sample, side) {
  const [width, height] = side === 'high' ? [sample.width, sample.height] : [sample.low_width, sample.low_height];
  const longer = Math.max(width, height);
  const maxLevel = Math.ceil(Math.log2(longer));
  const minLevel = Math.max(0, maxLevel - Math.max(0, Math.ceil(Math.log2(longer / TILE_PX))));
  return {
    width, height, tileSize: TILE_PX, tileOverlap: 0, minLevel, maxLevel,
    getTileUrl: (level, x, y) => tile(sample, side, level, x, y),
  };
}

/** The address of the smallest tile, which shows the whole image. */
export function firstTile(sample, side) {
  return tile(sample, side, pyramid(sample, side).minLevel, 0, 0);
}

export class Zoom {
  /** element: holds one element `.low` and one `.high`. told: {hovered(x, y), left(), zoomed(text), failed(side)} */
  constructor(element, told) {
    Object.assign(this, {element, told, boxes: {}, smooth: true});
    this.viewers = {low: this.viewer('low'), high: this.viewer('high')};
    this.leader = this.viewers.high;
    element.addEventListener('pointermove', event => this.hover(event));
    element.addEventListener('pointerleave', () => told.left());
  }

  viewer(side) {
    const gestures = {clickToZoom: false, dblClickToZoom: true, flickEnabled: false};
    const viewer = OpenSeadragon({
      element: this.element.querySelector(`.${side} .viewer`), drawer: 'canvas', showNavigationControl: false,
      autoResize: true, visibilityRatio: 0.5, minZoomImageRatio: 0.8,
      maxZoomPixelRatio: LARGEST_PIXEL, gestureSettingsMouse: gestures, gestureSettingsPen: gestures,
      gestureSettingsTouch: {...gestures, pinchRotate: false}, zoomPerScroll: 1.25, imageLoaderLimit: 6,
      animationTime: matchMedia('(prefers-reduced-motion: reduce)').matches ? 0 : 0.4, silenceMultiImageWarnings: true,
    });
    viewer.canvas.setAttribute('aria-label', `${side}-res image: drag moves it, the wheel zooms`);
    viewer.addHandler('canvas-key', event => { event.preventDefaultAction = true; });
    for (const name of ['canvas-enter', 'canvas-press', 'canvas-scroll', 'canvas-pinch']) {
      viewer.addHandler(name, () => { this.leader = viewer; });
    }
    for (const name of ['canvas-drag', 'canvas-scroll', 'canvas-pinch', 'canvas-double-click']) {
      viewer.addHandler(name, () => { this.whole = false; });
    }
    viewer.addHandler('viewport-change', () => this.follow(viewer));
    viewer.addHandler('resize', () => queueMicrotask(() => this.resized()));  // after the viewer's own adjustment
    viewer.addHandler('open', () => { this.say(); this.place(); });
    viewer.addHandler('tile-load-failed', () => this.told.failed(side));
    return viewer;
  }

  other(viewer) { return viewer === this.viewers.high ? this.viewers.low : this.viewers.high; }

  follow(viewer) {
    if (viewer === this.viewers.high) this.say();
    const other = this.other(viewer);
    if (viewer !== this.leader || !other.world.getItemCount()) return;
    other.viewport.zoomTo(viewer.viewport.getZoom(true), null, true);
    other.viewport.panTo(viewer.viewport.getCenter(true), true);
  }

  /** Show a sample, as a whole. */
  open(sample) {
    this.sample = sample;
    this.box(null);
    this.leader = this.viewers.high;
    this.whole = true;
    for (const side of ['low', 'high']) {
      this.viewers[side].forceResize();  // it had no size while the page's part was hidden
      this.viewers[side].open(pyramid(sample, side));
    }
    this.smoothing(this.smooth);
  }

  close() {
    this.sample = null;
    for (const viewer of Object.values(this.viewers)) viewer.close();
  }

  fit() {
    this.leader = this.viewers.high;
    this.whole = true;
    this.leader.viewport.goHome();
  }

  /** One px of the high-res image on one px of the screen. */
  oneToOne() {
    this.leader = this.viewers.high;
    this.whole = false;
    const image = this.leader.world.getItemAt(0);
    if (image) this.leader.viewport.zoomTo(image.imageToViewportZoom(1 / devicePixelRatio));
  }

  /** Call `alter`, which changes the size of both views. Their middle and their scale stay. */
  resize(alter) {
    this.kept = {scale: this.scale(), middle: this.viewers.high.viewport?.getCenter(true), viewers: 2};
    alter();
    for (const viewer of Object.values(this.viewers)) viewer.forceResize();
  }

  resized() {
    this.leader = this.viewers.high;
    const {world, viewport} = this.leader;
    const image = world.getItemAt(0);
    if (!image) return;
    if (this.whole) viewport.goHome(true);
    else if (this.kept?.scale) {
      viewport.zoomTo(image.imageToViewportZoom(this.kept.scale / devicePixelRatio), null, true);
      viewport.panTo(this.kept.middle, true);
    }
    if (this.kept && (this.kept.viewers -= 1) === 0) this.kept = null;
    this.follow(this.leader);
  }

  /** How large a px of the high-res image is, in px of the screen; null without an image. */
  scale() {
    const {world, viewport} = this.viewers.high;
    const image = world.getItemAt(0);
    return image ? image.viewportToImageZoom(viewport.getZoom(true)) * devicePixelRatio : null;
  }

  say() {
    const scale = this.scale();
    if (scale !== null) this.told.zoomed(scale);
  }

  /** Enlarge smoothly, or show px as squares. */
  smoothing(smooth) {
    this.smooth = smooth;
    for (const viewer of Object.values(this.viewers)) {
      viewer.imageSmoothingEnabled = smooth;
      viewer.drawer?.setImageSmoothingEnabled(smooth);
      viewer.forceRedraw();
    }
  }

  /** Outline a box {x, y, width, height} in parts of the image; null for none. */
  box(place) {
    this.boxed = place;
    this.place();
  }

  place() {
    for (const [side, viewer] of Object.entries(this.viewers)) {
      const image = viewer.world.getItemAt(0);
      this.boxes[side] ??= Object.assign(document.createElement('i'), {className: 'mark'});
      viewer.removeOverlay(this.boxes[side]);
      if (!this.boxed || !image) continue;
      const {height} = image.getBounds();
      const {x, y, width, height: tall} = this.boxed;
      const location = new OpenSeadragon.Rect(x, y * height, width, tall * height);
      viewer.addOverlay({element: this.boxes[side], location});
    }
  }

  hover(event) {
    const viewer = event.target.closest?.('.low') ? this.viewers.low : this.viewers.high;
    const image = viewer.world.getItemAt(0);
    if (!image || event.target.closest?.('.curtain')) return this.told.left();
    const {left, top} = viewer.element.getBoundingClientRect();
    const pixel = new OpenSeadragon.Point(event.clientX - left, event.clientY - top);
    const point = viewer.viewport.pointFromPixel(pixel, true);
    return this.told.hovered(point.x, point.y / image.getBounds().height);
  }
}
