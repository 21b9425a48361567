// A brush over a photo. props.value.photo: what to show, as a data URL; a new one clears the
// strokes. Keep sends props.value.mask: a PNG of the photo's size, transparent but for the strokes,
// or nothing if nothing is painted.
const INK = '#ff40c0';
const find = (selector) => element.querySelector(selector);
let photo = '', last = null, painted = false;

function show() {
  const picture = find('img'), canvas = find('canvas');
  photo = props.value?.photo || photo;
  if (!photo) return;
  picture.onload = () => {
    [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
    clear();
    find('.over').style.setProperty('--ratio', canvas.width / canvas.height);
    find('.brush').hidden = false;
  };
  picture.src = photo;
}

function clear() {
  const canvas = find('canvas');
  canvas.width = canvas.width;
  painted = false;
}

function paint(event) {
  const canvas = find('canvas'), context = canvas.getContext('2d');
  const frame = canvas.getBoundingClientRect(), scale = canvas.width / frame.width;
  const point = [(event.clientX - frame.left) * scale, (event.clientY - frame.top) * scale];
  last ??= [point[0] + 0.01, point[1]];  // a tap leaves a dot
  context.lineCap = 'round';
  context.lineWidth = find('.size').value / 100 * Math.max(canvas.width, canvas.height);
  context.strokeStyle = INK;
  context.globalCompositeOperation = find('.erase').checked ? 'destination-out' : 'source-over';
  context.beginPath();
  context.moveTo(...last);
  context.lineTo(...point);
  context.stroke();
  last = point;
  painted = true;
}

element.addEventListener('pointerdown', (event) => {
  if (event.target.tagName !== 'CANVAS' || event.button) return;
  event.preventDefault();
  event.target.setPointerCapture(event.pointerId);
  paint(event);
});
element.addEventListener('pointermove', (event) => { if (last) paint(event); });
for (const end of ['pointerup', 'pointercancel']) {
  element.addEventListener(end, () => { last = null; });
}

element.addEventListener('click', (event) => {
  if (event.target.matches('.clear')) clear();
  if (event.target.matches('.keep')) {
    props.value = { mask: painted ? find('canvas').toDataURL('image/png') : '' };
    trigger('input');
  }
});

watch('value', show);
show();
