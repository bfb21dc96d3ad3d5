// The editor of policies: CodeMirror with Cedar. The file is loaded where it is used.
//
// The editor is in a shadow root: there CodeMirror uses constructed style sheets, which the
// Content-Security-Policy allows, and not elements <style>, which it forbids.
import { defaultKeymap, history, historyKeymap } from "@codemirror/commands";
import { HighlightStyle, StreamLanguage, bracketMatching, indentUnit, syntaxHighlighting } from "@codemirror/language";
import { EditorState, RangeSet, StateEffect, StateField } from "@codemirror/state";
import { Decoration, EditorView, GutterMarker, drawSelection, gutterLineClass, highlightActiveLine, keymap, lineNumbers } from "@codemirror/view";
import { tags } from "@lezer/highlight";

const words = new Set(["permit", "forbid", "when", "unless", "if", "then", "else", "in", "like", "has", "is"]);
const names = new Set(["principal", "action", "resource", "context"]);

const cedar = StreamLanguage.define<object>({
  name: "cedar",
  startState: () => ({}),
  languageData: { commentTokens: { line: "//" } },
  token(s) {
    if (s.eatSpace()) return null;
    if (s.match("//")) { s.skipToEnd(); return "comment"; }
    if (s.match(/^"(\\.|[^"\\])*"?/)) return "string";
    if (s.match(/^@\w+/)) return "meta";
    if (s.match(/^-?\d+/)) return "number";
    const word = s.match(/^[A-Za-z_]\w*/) as RegExpMatchArray | null;
    if (word) {
      if (word[0] === "true" || word[0] === "false") return "bool";
      return words.has(word[0]) ? "keyword" : names.has(word[0]) ? "variableName" : s.peek() === ":" ? "typeName" : "propertyName";
    }
    if (s.match(/^(==|!=|<=|>=|&&|\|\||[<>!+*-])/)) return "operator";
    s.next();
    return "punctuation";
  },
});

const colours = HighlightStyle.define([
  { tag: tags.keyword, color: "var(--mark)", fontWeight: "600" },
  { tag: tags.string, color: "var(--ok)" },
  { tag: [tags.number, tags.bool], color: "var(--info)" },
  { tag: tags.comment, color: "var(--quiet)", fontStyle: "italic" },
  { tag: tags.typeName, color: "var(--warn)" },
  { tag: tags.meta, color: "var(--off)" },
]);

const look = EditorView.theme({
  "&": { backgroundColor: "var(--leaf)", color: "var(--ink)", border: "1px solid var(--strong)", fontSize: "13px", maxHeight: "60vh" },
  "&.cm-focused": { outline: "2px solid var(--mark)" },
  ".cm-scroller": { fontFamily: "var(--mono)", overflow: "auto", minHeight: "16rem" },
  ".cm-gutters": { backgroundColor: "var(--paper)", color: "var(--quiet)", border: "0", borderRight: "1px solid var(--rule)" },
  ".cm-activeLine, .cm-activeLineGutter": { backgroundColor: "var(--wash)" },
  ".cm-cursor": { borderLeftColor: "var(--ink)" },
  ".cm-selectionBackground, &.cm-focused > .cm-scroller > .cm-selectionLayer .cm-selectionBackground": { backgroundColor: "var(--info-wash)" },
  ".cm-bad": { backgroundColor: "var(--crit-wash)", boxShadow: "inset 3px 0 var(--crit)" },
  ".cm-doubt": { backgroundColor: "var(--warn-wash)", boxShadow: "inset 3px 0 var(--warn)" },
  ".cm-tooltip": { backgroundColor: "var(--paper)", color: "var(--ink)", border: "1px solid var(--strong)" },
});

/** setMarks replaces the marked lines. The package of CodeMirror for it needs images from data: addresses. */
const setMarks = StateEffect.define<{ from: number; grave: boolean }[]>();

class Numbered extends GutterMarker {
  constructor(readonly elementClass: string) { super(); }
}
const bad = new Numbered("cm-bad"), doubtful = new Numbered("cm-doubt");

const marked = StateField.define<{ from: number; grave: boolean }[]>({
  create: () => [],
  update(all, t) {
    for (const e of t.effects) if (e.is(setMarks)) return e.value;
    return t.docChanged ? all.map((m) => ({ ...m, from: t.newDoc.lineAt(t.changes.mapPos(m.from)).from })) : all;
  },
  provide: (f) => [
    EditorView.decorations.from(f, (all) => Decoration.set(all.map((m) => Decoration.line({ class: m.grave ? "cm-bad" : "cm-doubt" }).range(m.from)), true)),
    gutterLineClass.from(f, (all) => RangeSet.of(all.map((m) => (m.grave ? bad : doubtful).range(m.from)), true)),
  ],
});

/** typed puts typed text in by itself: Chromium's editing adds style attributes, which the Content-Security-Policy forbids. */
const typed = EditorView.domEventHandlers({
  beforeinput(e, view) {
    if (e.inputType !== "insertText" || e.isComposing || !e.data) return false;
    view.dispatch(view.state.replaceSelection(e.data), { userEvent: "input.type", scrollIntoView: true });
    e.preventDefault();
    return true;
  },
});

export type Mark = { line: number; grave: boolean };
export type Editor = { marks: (all: Mark[]) => void; goTo: (line: number) => void; text: () => string; end: () => void };

/** edit puts an editor with a text into an element. */
export function edit(into: HTMLElement, text: string, changed: (text: string) => void): Editor {
  const root = into.shadowRoot ?? into.attachShadow({ mode: "open" });
  root.replaceChildren();
  const view = new EditorView({
    root,
    parent: root,
    state: EditorState.create({
      doc: text,
      extensions: [
        lineNumbers(), history(), drawSelection(), highlightActiveLine(), bracketMatching(), marked, typed, indentUnit.of("  "),
        EditorState.tabSize.of(2), EditorView.lineWrapping, cedar, syntaxHighlighting(colours), look,
        keymap.of([...defaultKeymap, ...historyKeymap]), // Tab leaves the editor
        EditorView.contentAttributes.of({ "aria-label": "Text of the policy, in Cedar", spellcheck: "false" }),
        EditorView.updateListener.of((u) => { if (u.docChanged) changed(u.state.doc.toString()); }),
      ],
    }),
  });
  const lineOf = (n: number) => view.state.doc.line(Math.min(Math.max(1, n), view.state.doc.lines));
  return {
    marks(all) {
      view.dispatch({ effects: setMarks.of(all.filter((m) => m.line > 0).map((m) => ({ from: lineOf(m.line).from, grave: m.grave }))) });
    },
    goTo(line) {
      const l = lineOf(line);
      view.dispatch({ selection: { anchor: l.from }, scrollIntoView: true });
      view.focus();
    },
    text: () => view.state.doc.toString(),
    end: () => view.destroy(),
  };
}
