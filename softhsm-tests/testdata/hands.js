// What a person does with a page, for tests: find things by their names, press, fill, wait.
self.violations = [];
addEventListener("securitypolicyviolation", e => self.violations.push(e.violatedDirective + " " + e.blockedURI + " " + e.sourceFile));
self.failures = [];
addEventListener("error", e => self.failures.push(String(e.message)));
addEventListener("unhandledrejection", e => self.failures.push(String(e.reason)));
self.hands = {
	name: e => (e.getAttribute("aria-label") ?? e.innerText ?? "").trim(),
	scope: () => [...document.querySelectorAll("dialog[open]")].at(-1) ?? document.body,
	find: (selector, name) => [...hands.scope().querySelectorAll(selector)].find(e => hands.name(e).startsWith(name) && e.checkVisibility()),
	press: name => {
		const e = hands.find("button, a, summary, [role=option]", name);
		if (!e) throw new Error("there is nothing to press named " + name + ": " + hands.scope().innerText.slice(0, 600));
		if (e.disabled) throw new Error(name + " is disabled");
		e.click();
		return true;
	},
	field: label => {
		const named = l => { // a box has its explanation in the label
			const text = l.innerText.trim(), box = ["checkbox", "radio"].includes(l.control?.type);
			return box ? text.startsWith(label) : text === label;
		};
		const e = [...hands.scope().querySelectorAll("label")].find(named)?.control;
		if (!e) throw new Error("there is no field " + label + ": " + hands.scope().innerText.slice(0, 600));
		return e;
	},
	fill: (label, text) => {
		const e = hands.field(label);
		if (e.type === "checkbox" || e.type === "radio") { if (e.checked !== text) e.click(); return true; }
		const kind = {TEXTAREA: HTMLTextAreaElement, SELECT: HTMLSelectElement}[e.tagName] ?? HTMLInputElement;
		Object.getOwnPropertyDescriptor(kind.prototype, "value").set.call(e, text);
		e.dispatchEvent(new Event("input", {bubbles: true}));
		e.dispatchEvent(new Event("change", {bubbles: true}));
		return true;
	},
	pressable: name => {
		const e = hands.find("button, a, summary, [role=option]", name);
		return e && !e.disabled;
	},
	visit: path => {
		history.pushState(null, "", path);
		dispatchEvent(new PopStateEvent("popstate"));
		return true;
	},
	// timed visits an address, and returns how many milliseconds the page takes to show a text.
	timed: (path, text) => new Promise((done, fail) => {
		const begin = performance.now();
		hands.visit(path);
		const look = () => {
			if (!document.querySelector(".waiting") && document.querySelector("h1") && hands.text().includes(text)) done(performance.now() - begin);
			else if (performance.now() - begin > 30000) fail(new Error(path + " does not show " + text + ": " + hands.text().slice(0, 1500)));
			else setTimeout(look, 2);
		};
		look();
	}),
	faults: async () => { // by axe-core, which the test has loaded
		const { violations } = await axe.run(document, {resultTypes: ["violations"]});
		return violations.filter(v => ["serious", "critical"].includes(v.impact)).flatMap(v =>
			v.nodes.slice(0, 3).map(n => `${v.id}: ${n.failureSummary} ${n.html.slice(0, 200)}`));
	},
	// active is the element with the focus, in a shadow tree too.
	active: () => {
		let e = document.activeElement;
		while (e?.shadowRoot?.activeElement) e = e.shadowRoot.activeElement;
		return e && e !== document.body && e !== document.documentElement ? e : null;
	},
	// focus names the element with the focus; "" is none.
	focus: () => {
		const e = hands.active();
		if (!e) return "";
		e.dataset.stop ??= String(hands.stop = (hands.stop ?? 0) + 1);
		return `${e.tagName} ${e.dataset.stop} ${hands.name(e).slice(0, 40)}`;
	},
	focusFault: () => {
		const e = hands.active();
		if (!e) return "";
		const s = getComputedStyle(e), r = e.getBoundingClientRect();
		if (!e.checkVisibility()) return "it can't be seen";
		if (r.bottom <= 0 || r.top >= innerHeight) return "it is out of sight";
		const marked = s.outlineStyle !== "none" && parseFloat(s.outlineWidth) > 0 || s.boxShadow !== "none";
		return marked || e.closest(".cm-editor") ? "" : "nothing shows the focus";
	},
	// focusable counts what a person can use.
	focusable: () => [...document.querySelectorAll("a[href], button, input, select, textarea, summary")]
		.filter(e => !e.disabled && e.tabIndex >= 0 && e.checkVisibility() && !(e.type === "radio" && !e.checked)).length,
	moving: () => [...document.querySelectorAll("*")].filter(e => {
		const s = getComputedStyle(e);
		return s.animationName !== "none" || s.transitionDuration.split(",").some(d => parseFloat(d) > 0);
	}).map(e => e.tagName + "." + e.className),
	text: () => document.body.innerText,
	until: (what, ms) => new Promise((done, fail) => {
		const end = Date.now() + ms;
		const look = () => {
			let v;
			try { v = what(); } catch (e) { v = false; }
			if (v) done(v);
			else if (Date.now() > end) fail(new Error("it does not become so: " + what + "\n" + document.body.innerText.slice(0, 1500)));
			else setTimeout(look, 20);
		};
		look();
	}),
};
