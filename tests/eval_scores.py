"""Writes tests/eval_scores.json: texts with the scores that sacreBLEU gives them.

    pip install sacrebleu==2.5.1
    python tests/eval_scores.py
"""

import json
import pathlib
import random

import sacrebleu

CORPORA = [
    (["the cat sat on the mat"], ["the cat sat on the mat"]),
    (["the cat sat on a mat today"], ["the cat sat on the mat"]),
    (["nothing alike here"], ["zwölf Boxkämpfer jagen"]),
    (["short"], ["short"]),
    (["Hello, world! It's 3.5 o'clock."], ["Hello world; it's 3,5 o'clock."]),
    ([""], ["something that was expected"]),
    (["something that was not expected"], [""]),
    (["Größe 10-12 (alt) & neu &quot;x&quot;", "second line\nwith a break"], ["Größe 10-12 [alt] und neu \"x\"", "second line with breaks"]),
    (["a b", "a b c d e f g"], ["a b c", "a b c d x f g h"]),
    (["今日は天気がいいですね", "são paulo é grande"], ["今日は天気が良いです", "São Paulo é muito grande"]),
    (["1,000.50 dollars. The end-\nof it"], ["1,000.50 dollars, the end of it"]),
]

WORDS = "the a of to office opens at nine ten Monday Friday, closed. 3.5 £20 (see page 4) form B-12 staff must ask; why? yes!".split()


def random_corpus(seed):
    draw = random.Random(seed)
    references = [" ".join(draw.choices(WORDS, k=draw.randint(1, 25))) for _ in range(draw.randint(2, 8))]

    def spoiled(text):
        words = [draw.choice(WORDS) if draw.random() < 0.3 else word for word in text.split()]
        return " ".join(word for word in words if draw.random() > 0.1)

    return [spoiled(text) for text in references], references


def scored(answers, references):
    bleu = sacrebleu.corpus_bleu(answers, [references]).score
    chrf = sacrebleu.corpus_chrf(answers, [references]).score
    return {"answers": answers, "references": references, "bleu": bleu, "chrf": chrf}


corpora = CORPORA + [random_corpus(seed) for seed in range(8)]
path = pathlib.Path(__file__).with_name("eval_scores.json")
path.write_text(json.dumps([scored(*corpus) for corpus in corpora], ensure_ascii=False, indent=1) + "\n")
