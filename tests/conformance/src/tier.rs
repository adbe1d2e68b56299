//! How far a test is from what neural networks compute: the highest tier of its operators.

use std::fmt;
use tpshard_frontend::proto::{GraphProto, TypeProto, TypeValue};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Tier {
    /// Tensor computation: elementwise, movement, contraction, reduction, normalization, attention, pooling, storage.
    Tensor,
    /// Other numbers, recurrence, windows and transforms, sampling, random numbers, control flow.
    Numeric,
    /// Strings, sequences, optionals, decoders, training, losses, other domains.
    Exotic,
}

/// The operators of [`Tier::Numeric`].
const NUMERIC: &[&str] = &[
    "Acos",
    "Acosh",
    "AffineGrid",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "Bernoulli",
    "BitCast",
    "BitShift",
    "BitwiseAnd",
    "BitwiseNot",
    "BitwiseOr",
    "BitwiseXor",
    "BlackmanWindow",
    "CenterCropPad",
    "Col2Im",
    "Compress",
    "Cosh",
    "CumProd",
    "DFT",
    "DeformConv",
    "Det",
    "GRU",
    "GlobalLpPool",
    "GridSample",
    "HammingWindow",
    "HannWindow",
    "Hardmax",
    "If",
    "LSTM",
    "Loop",
    "LpPool",
    "MaxRoiPool",
    "MaxUnpool",
    "MelWeightMatrix",
    "Multinomial",
    "NonMaxSuppression",
    "RNN",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "ReverseSequence",
    "RoiAlign",
    "STFT",
    "Scan",
    "Shrink",
    "Sinh",
    "Tan",
    "Unique",
];

/// The operators of [`Tier::Exotic`]; those of other domains, `ai.onnx.preview` excepted, are too.
const EXOTIC: &[&str] = &[
    "ConcatFromSequence",
    "ImageDecoder",
    "NegativeLogLikelihoodLoss",
    "Optional",
    "OptionalGetElement",
    "OptionalHasElement",
    "RegexFullMatch",
    "SequenceAt",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceErase",
    "SequenceInsert",
    "SequenceLength",
    "SequenceMap",
    "SoftmaxCrossEntropyLoss",
    "SplitToSequence",
    "StringConcat",
    "StringNormalizer",
    "StringSplit",
    "TfIdfVectorizer",
];

impl Tier {
    pub(crate) const ALL: [Tier; 3] = [Tier::Tensor, Tier::Numeric, Tier::Exotic];

    pub(crate) fn of(graph: &GraphProto) -> Tier {
        let values = graph.input.iter().chain(&graph.output).chain(&graph.value_info);
        let exotic = |ty: Option<&TypeProto>| match ty.and_then(|ty| ty.value.as_ref()) {
            Some(TypeValue::Tensor(tensor)) => tensor.elem_type == STRING,
            Some(_) => true,
            None => false,
        };
        if values.into_iter().any(|value| exotic(value.r#type.as_deref())) {
            return Tier::Exotic;
        }
        let mut tier = Tier::Tensor;
        for node in &graph.node {
            tier = tier.max(Tier::of_operator(&node.domain, &node.op_type));
            for attribute in &node.attribute {
                let graphs = attribute.g.as_deref().into_iter().chain(&attribute.graphs);
                tier = graphs.map(Tier::of).fold(tier, Tier::max);
            }
        }
        tier
    }

    fn of_operator(domain: &str, name: &str) -> Tier {
        match domain {
            "" | "ai.onnx" if EXOTIC.contains(&name) => Tier::Exotic,
            "" | "ai.onnx" if NUMERIC.contains(&name) => Tier::Numeric,
            "" | "ai.onnx" | "ai.onnx.preview" => Tier::Tensor,
            _ => Tier::Exotic,
        }
    }
}

/// `TensorProto.STRING`.
const STRING: i32 = 8;

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tier::Tensor => "1: tensor computation",
            Tier::Numeric => "2: other numbers, recurrence, control flow",
            Tier::Exotic => "3: strings, sequences, optionals, training, losses, other domains",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tpshard_frontend::proto::{AttributeProto, NodeProto};

    fn node(name: &str) -> NodeProto {
        NodeProto { op_type: name.into(), ..NodeProto::default() }
    }

    #[test]
    fn the_highest_operator_decides_also_inside() {
        let graph = |nodes: Vec<NodeProto>| GraphProto { node: nodes, ..GraphProto::default() };
        assert_eq!(Tier::of(&graph(vec![node("Add")])), Tier::Tensor);
        assert_eq!(Tier::of(&graph(vec![node("Loop"), node("Add")])), Tier::Numeric);
        let inner = graph(vec![node("SequenceEmpty")]);
        let body = AttributeProto { g: Some(Box::new(inner)), ..AttributeProto::default() };
        let outer = NodeProto { attribute: vec![body], ..node("If") };
        assert_eq!(Tier::of(&graph(vec![outer])), Tier::Exotic);
        let foreign = NodeProto { domain: "ai.onnx.ml".into(), ..node("Binarizer") };
        assert_eq!(Tier::of(&graph(vec![foreign])), Tier::Exotic);
    }
}
