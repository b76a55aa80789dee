// The picture of the first page: weights turn with a slider, the output stays, and fixing
// the gauge makes a weight zero, so that it need not be stored.
(() => {
  const root = document.querySelector('#gauge');
  if (!root) return;
  const slider = root.querySelector('input');
  const button = root.querySelector('button');
  const dots = [...root.querySelectorAll('.weight')];
  const cells = [...root.querySelectorAll('.cell')];
  const bar = root.querySelector('.bytes');
  const words = root.querySelector('.words');
  const start = dots.map(dot => [+dot.dataset.x, +dot.dataset.y]);
  const matrix = [[0.9, 0.5, -0.7], [0.4, -0.8, 0.6], [-0.5, 0.7, 0.8]];
  // The angles that make the three elements below the diagonal zero, one after the other.
  const zeros = (() => {
    let m = matrix.map(row => [...row]);
    const found = [];
    for (const [i, j] of [[1, 0], [2, 0], [2, 1]]) {
      const angle = Math.atan2(m[i][j], m[j][j]);
      found.push([i, j, angle]);
      m = turned(m, i, j, angle);
    }
    return found;
  })();

  function turned(m, i, j, angle) {
    const [c, s] = [Math.cos(angle), Math.sin(angle)];
    const rows = m.map(row => [...row]);
    for (let k = 0; k < 3; k++) {
      rows[j][k] = c * m[j][k] + s * m[i][k];
      rows[i][k] = c * m[i][k] - s * m[j][k];
    }
    return rows;
  }

  function draw(angle, fixed) {
    const [c, s] = [Math.cos(angle), Math.sin(angle)];
    dots.forEach((dot, i) => {
      const [x, y] = start[i];
      dot.setAttribute('cx', 90 + c * x - s * y);
      dot.setAttribute('cy', 85 + s * x + c * y);
    });
    let m = turned(turned(matrix, 1, 0, angle), 2, 1, angle * 0.7);
    if (fixed > 0) {
      m = matrix;
      for (const [i, j, zero] of zeros) m = turned(m, i, j, zero * fixed);
    }
    let stored = 0;
    cells.forEach((cell, k) => {
      const value = m[Math.floor(k / 3)][k % 3];
      const small = Math.abs(value) < 0.005;
      stored += small ? 0 : 1;
      cell.setAttribute('fill-opacity', small ? 0 : 0.15 + 0.7 * Math.abs(value));
      cell.setAttribute('stroke-dasharray', small ? '3 3' : '');
    });
    bar.setAttribute('width', 15 * stored);
    words.textContent = `${stored} of 9 numbers stored, the same output`;
  }

  let moving = 0;
  slider.addEventListener('input', () => {
    cancelAnimationFrame(moving);
    draw(+slider.value * Math.PI / 180, 0);
  });
  button.addEventListener('click', () => {
    const begin = performance.now();
    const angle = +slider.value * Math.PI / 180;
    const still = matchMedia('(prefers-reduced-motion: reduce)').matches;
    const step = now => {
      const part = still ? 1 : Math.min((now - begin) / 900, 1);
      draw(angle * (1 - part), part);
      if (part < 1) moving = requestAnimationFrame(step);
      else slider.value = 0;
    };
    cancelAnimationFrame(moving);
    moving = requestAnimationFrame(step);
  });
  root.querySelector('.controls').hidden = false;
  draw(+slider.value * Math.PI / 180, 0);
})();
