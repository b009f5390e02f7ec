// In the page of an error 401: asks for the key, and shows what it opens in place of that page.

const form = document.querySelector("form");
const field = form.querySelector("input");
const note = form.querySelector("output");
const NAME = "klein.key"; // the page at / keeps its key under the same

const forget = () => {
  try {
    sessionStorage.removeItem(NAME);
  } catch {
    // Without storage there is nothing to forget.
  }
};

const show = async (key) => {
  const answer = await fetch(location.href, { headers: { accept: "text/html", authorization: `Bearer ${key}` } });
  if (answer.status === 401) {
    note.textContent = "The service does not know this key.";
    forget();
    return;
  }
  const text = await answer.text();
  if (answer.headers.get("content-type").startsWith("text/html")) {
    const page = new DOMParser().parseFromString(text, "text/html");
    document.replaceChild(document.adoptNode(page.documentElement), document.documentElement);
  } else {
    const plain = document.createElement("pre");
    plain.textContent = text;
    document.body.replaceChildren(plain);
  }
  try {
    sessionStorage.setItem(NAME, key);
  } catch {
    // Without storage it is asked for each time.
  }
};

const tryToShow = async (key) => {
  try {
    await show(key);
  } catch {
    note.textContent = "The service cannot be asked with this key.";
  }
};

const remembered = () => {
  try {
    return sessionStorage.getItem(NAME);
  } catch {
    return null;
  }
};

form.addEventListener("submit", (event) => {
  event.preventDefault();
  tryToShow(field.value.trim());
});
if (remembered()) tryToShow(remembered());
