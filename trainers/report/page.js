"use strict";
for (const films of document.querySelectorAll(".films")) {
  const slider = films.querySelector("input");
  if (!slider) continue;
  const epochs = slider.dataset.epochs.split(" ").map(Number);
  const show = () => {
    const epoch = epochs[slider.value];
    films.querySelector("output").textContent = epoch;
    for (const strip of films.querySelectorAll(".strip")) {
      const past = [...strip.querySelectorAll("figure")].filter(figure => Number(figure.dataset.epoch) <= epoch);
      const figure = past.length ? past[past.length - 1] : strip.querySelector("figure");
      const shown = strip.querySelector(".shown");
      shown.replaceChildren(figure.querySelector("img").cloneNode());
      shown.dataset.epoch = figure.dataset.epoch;
      shown.hidden = false;
    }
  };
  slider.addEventListener("input", show);
  show();
}
