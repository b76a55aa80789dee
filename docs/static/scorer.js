// The search finds `rotbits_jax.encode` before names of the same ending in modules.
var Scorer = {
  score: ([docname, title, anchor, description, score]) =>
    score + (/^rotbits_jax[.]\w+$/.test(title) && !/module/.test(description) ? 20 : 0),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: {0: 15, 1: 5, 2: -5},
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
