// A stage with one box per asset: drag to move, drag the corner to resize, drag on the ground to
// draw the chosen box anew; arrow keys move, with Shift they resize. Touch works like the mouse.
// props.value = {names, boxes: [[x0, y0, x1, y1] in fractions], colors}
const LEAST = 0.04, STEP = 0.01;
const ENDS = ['pointerup', 'pointercancel'];
let chosen = 0, held = false;  // held: the chosen box has the focus, which redrawing must not lose

const clip = (value, low, high) => Math.min(Math.max(value, low), high);
const boxAt = (index) => element.querySelectorAll('.box')[index];

function place(node, [x0, y0, x1, y1]) {
  const sides = { left: x0, top: y0, width: x1 - x0, height: y1 - y0 };
  for (const [side, value] of Object.entries(sides)) node.style[side] = `${100 * value}%`;
}

function draw() {
  const stage = element.querySelector('.stage');
  const { names, boxes, colors } = props.value;
  stage.replaceChildren(...boxes.map((box, index) => {
    const node = document.createElement('div');
    node.className = index === chosen ? 'box chosen' : 'box';
    node.tabIndex = 0;
    node.setAttribute('role', 'group');
    node.setAttribute('aria-label', `${names[index]} at ${box.join(', ')}; arrow keys move it`);
    node.style.setProperty('--color', colors[index % colors.length]);
    const label = document.createElement('span');
    label.textContent = names[index];
    const corner = document.createElement('i');
    node.append(label, corner);
    place(node, box);
    return node;
  }));
  if (held && document.activeElement === document.body) boxAt(chosen)?.focus();
}

function moved(box, dx, dy) {
  const [width, height] = [box[2] - box[0], box[3] - box[1]];
  const x = clip(box[0] + dx, 0, 1 - width), y = clip(box[1] + dy, 0, 1 - height);
  return [x, y, x + width, y + height];
}

function resized(box, dx, dy) {
  const [x, y] = [clip(box[2] + dx, box[0] + LEAST, 1), clip(box[3] + dy, box[1] + LEAST, 1)];
  return [box[0], box[1], x, y];
}

function drawn(from, dx, dy) {
  const [x, y] = [clip(from[0] + dx, 0, 1), clip(from[1] + dy, 0, 1)];
  const [left, top] = [Math.min(from[0], x, 1 - LEAST), Math.min(from[1], y, 1 - LEAST)];
  return resized([left, top, Math.max(from[0], x), Math.max(from[1], y)], 0, 0);
}

function keep(index, box) {
  const boxes = props.value.boxes.slice();
  boxes[index] = box.map((side) => Math.round(1000 * side) / 1000);
  props.value = { ...props.value, boxes };
  draw();
  trigger('input');
}

element.addEventListener('pointerdown', (event) => {
  const stage = event.target.closest('.stage');
  if (!stage || event.button || !props.value.boxes.length) return;
  const frame = stage.getBoundingClientRect();
  const at = ({ clientX, clientY }) =>
    [(clientX - frame.left) / frame.width, (clientY - frame.top) / frame.height];
  const node = event.target.closest('.box');
  if (node) chosen = [...element.querySelectorAll('.box')].indexOf(node);
  chosen = Math.min(chosen, props.value.boxes.length - 1);
  const start = at(event), before = props.value.boxes[chosen];
  const change = !node ? drawn : event.target.tagName === 'I' ? resized : moved;
  let after = null;
  held = true;
  document.activeElement.blur();
  draw();
  event.preventDefault();
  const move = (e) => {
    const [x, y] = at(e);
    after = change(node ? before : start, x - start[0], y - start[1]);
    place(boxAt(chosen), after);
  };
  const end = () => {
    window.removeEventListener('pointermove', move);
    for (const name of ENDS) window.removeEventListener(name, end);
    if (after) keep(chosen, after);
  };
  window.addEventListener('pointermove', move);
  for (const name of ENDS) window.addEventListener(name, end);
});

element.addEventListener('keydown', (event) => {
  const steps = {
    ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP],
  };
  const step = steps[event.key];
  const node = event.target.closest('.box');
  if (!step || !node) return;
  event.preventDefault();
  held = true;
  chosen = [...element.querySelectorAll('.box')].indexOf(node);
  const box = props.value.boxes[chosen];
  keep(chosen, event.shiftKey ? resized(box, ...step) : moved(box, ...step));
});

watch('value', draw);
draw();
