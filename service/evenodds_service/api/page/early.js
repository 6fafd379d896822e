// Asks for what the view of a run shows before the modules are there that draw it: `ask` takes the replies from here.

const early = new Map(); // path -> the reply that will come
const memory = new Map(); // takes the place of the browser's storages where site data is blocked: asking for one throws

function kept(storage, name) {
  try {
    return window[storage].getItem(name);
  } catch {
    return memory.get(name) ?? null;
  }
}

function keep(storage, name, value) {
  try {
    window[storage].setItem(name, value);
  } catch {
    memory.set(name, value);
  }
}

function authorization() {
  const key = kept("sessionStorage", "evenodds-key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function askEarly(hash) {
  const run = /^#\/?runs\/([^/?]+)(?:\?|$)/.exec(hash)?.[1];
  if (!run) return;
  for (const path of [`runs/${run}`, `runs/${run}/report`, `runs/${run}/refits`]) {
    const reply = fetch(path, { headers: { Accept: "application/json", ...authorization() } });
    reply.catch(() => null); // whoever takes it is told
    early.set(path, reply);
  }
}
askEarly(location.hash);
