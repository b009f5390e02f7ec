// Finds and makes elements. A text is always set as text, never as markup.

export const $ = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function button(text, className, onClick) {
  const made = element("button", { type: "button", textContent: text, className });
  made.addEventListener("click", onClick);
  return made;
}
