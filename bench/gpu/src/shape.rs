//! Sizes of a decoder like Llama, and what a step of it has to read and to compute.

use serde_json::{Value, json};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) layers: usize,
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) depth: usize,
    pub(crate) ffn: usize,
    pub(crate) vocabulary: usize,
    /// Tokens of the prompt.
    pub(crate) prompt: usize,
}

impl Shape {
    /// With a quarter of the layers: all are alike.
    pub(crate) fn llama_8b() -> Shape {
        Shape {
            layers: 8,
            hidden: 4096,
            heads: 32,
            kv_heads: 8,
            depth: 128,
            ffn: 14336,
            vocabulary: 128_256,
            prompt: 2048,
        }
    }

    pub(crate) fn small() -> Shape {
        Shape {
            layers: 2,
            hidden: 64,
            heads: 8,
            kv_heads: 8,
            depth: 16,
            ffn: 128,
            vocabulary: 256,
            prompt: 16,
        }
    }

    /// What rank 0 of `ranks` has of it.
    pub(crate) fn share(&self, ranks: usize) -> Shape {
        let part = |whole: usize| whole.div_ceil(ranks).max(1);
        Shape {
            heads: part(self.heads),
            kv_heads: part(self.kv_heads),
            ffn: part(self.ffn),
            vocabulary: part(self.vocabulary),
            ..*self
        }
    }

    /// Elements of the largest weight.
    pub(crate) fn largest(&self) -> usize {
        self.hidden * self.vocabulary.max(self.ffn).max(self.heads * self.depth)
    }

    /// Elements of the weights that a layer multiplies with.
    fn layer_weights(&self) -> usize {
        let (queries, keys) = (self.heads * self.depth, self.kv_heads * self.depth);
        self.hidden * (2 * queries + 2 * keys + 3 * self.ffn)
    }

    /// Bytes that decoding one token behind the prompt reads at least: every weight of a product and what is held of the
    /// prompt, once.
    fn token_bytes(&self) -> usize {
        let weights = self.layers * self.layer_weights() + self.hidden * self.vocabulary;
        let state = 2 * self.layers * self.kv_heads * self.depth * self.prompt;
        2 * (weights + state)
    }

    /// Multiplications and additions of the prompt, the logits of its last token included; half of all scores are masked and
    /// not counted.
    fn prompt_operations(&self) -> usize {
        let products = 2 * self.prompt * self.layers * self.layer_weights();
        let attention = 2 * self.layers * self.heads * self.depth * self.prompt * self.prompt;
        products + attention + 2 * self.hidden * self.vocabulary
    }

    pub(crate) fn to_json(self) -> Value {
        json!({
            "layers": self.layers,
            "hidden": self.hidden,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "depth": self.depth,
            "ffn": self.ffn,
            "vocabulary": self.vocabulary,
            "prompt": self.prompt,
            "token_bytes": self.token_bytes(),
            "prompt_operations": self.prompt_operations(),
        })
    }
}
