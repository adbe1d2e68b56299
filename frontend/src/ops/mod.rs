//! The operators of ONNX and of ONNX Runtime that are understood: one table, one function each.
//!
//! A row says from which to which version of its domain a lowering holds and how many inputs the operator has at most.
//! The functions live in one file per family, next to what their specification says. They take a [`Call`] and return the
//! values of the node's outputs in order; attributes nobody asked for are refused by the caller.

mod activation;
mod attention;
mod constant;
mod contraction;
mod contrib_attention;
mod convolution;
mod determinant;
mod elementwise;
mod experts;
mod flex_attention;
mod grouped_query;
mod heads;
mod index;
mod losses;
mod movement;
mod movement_data;
mod normalization;
mod packed_weights;
mod pooling;
mod quantized;
mod quantized_contrib;
mod quantized_conv;
mod recurrent;
mod reduction;
mod resize;
mod rotary;
mod sampling;
mod shape;
mod spectral;
mod storage;
mod transposed;

use crate::error::{Fault, quote};
use crate::lower::{Call, Lowered, Lowering, Value};
use std::collections::HashMap;
use std::sync::LazyLock;

type Lower = fn(&mut Lowering<'_>, &Call<'_>) -> Lowered<Vec<Value>>;

/// One operator, or one stretch of its history.
pub(crate) struct Row {
    pub(crate) domain: &'static str,
    pub(crate) op_type: &'static str,
    /// First and last version of the domain.
    pub(crate) from: i64,
    pub(crate) to: i64,
    /// Most inputs.
    pub(crate) inputs: usize,
    pub(crate) lower: Lower,
}

const ONNX: &str = "";
const PREVIEW: &str = "ai.onnx.preview";
const MICROSOFT: &str = "com.microsoft";
/// No later version changes the operator.
const NOW: i64 = i64::MAX;
/// The opset from which on every operator there is can be looked up; of those before, what has not changed since is.
const FIRST: i64 = 6;
/// As many inputs as given.
const ANY: usize = usize::MAX;

macro_rules! table {
    ($($domain:ident $op:literal $from:literal..$to:tt $inputs:tt $lower:path;)*) => {
        /// Every supported operator.
        pub(crate) const TABLE: &[Row] = &[$(Row {
            domain: $domain, op_type: $op, from: $from, to: $to, inputs: $inputs, lower: $lower,
        },)*];
    };
}

table! {
    ONNX "Abs" 6..NOW 1 elementwise::unary;
    ONNX "Acos" 7..NOW 1 elementwise::unary;
    ONNX "Acosh" 9..NOW 1 elementwise::unary;
    ONNX "Add" 6..NOW 2 elementwise::binary;
    ONNX "AffineGrid" 20..NOW 2 sampling::affine_grid;
    ONNX "And" 1..NOW 2 elementwise::binary;
    ONNX "ArgMax" 1..NOW 1 reduction::arg;
    ONNX "ArgMin" 1..NOW 1 reduction::arg;
    ONNX "Asin" 7..NOW 1 elementwise::unary;
    ONNX "Asinh" 9..NOW 1 elementwise::unary;
    ONNX "Atan" 7..NOW 1 elementwise::unary;
    ONNX "Atanh" 9..NOW 1 elementwise::unary;
    ONNX "Attention" 23..NOW 7 attention::attention;
    ONNX "AveragePool" 1..NOW 1 convolution::average_pool;
    ONNX "BatchNormalization" 6..NOW 5 normalization::batch_normalization;
    ONNX "BitCast" 26..NOW 1 storage::bit_cast;
    ONNX "BitShift" 11..NOW 2 elementwise::bit_shift;
    ONNX "BitwiseAnd" 18..NOW 2 elementwise::binary;
    ONNX "BitwiseNot" 18..NOW 1 elementwise::unary;
    ONNX "BitwiseOr" 18..NOW 2 elementwise::binary;
    ONNX "BitwiseXor" 18..NOW 2 elementwise::binary;
    ONNX "BlackmanWindow" 17..NOW 1 spectral::window;
    ONNX "Cast" 6..NOW 1 storage::cast;
    ONNX "CastLike" 15..NOW 2 storage::cast_like;
    ONNX "Ceil" 6..NOW 1 elementwise::unary;
    ONNX "Celu" 12..NOW 1 activation::celu;
    ONNX "CenterCropPad" 18..NOW 2 movement_data::center_crop_pad;
    ONNX "Clip" 6..NOW 3 activation::clip;
    ONNX "Col2Im" 18..NOW 3 transposed::col2im;
    ONNX "Concat" 4..NOW ANY movement::concat;
    ONNX "Constant" 1..NOW 0 constant::constant;
    ONNX "ConstantOfShape" 9..NOW 1 constant::constant_of_shape;
    ONNX "Conv" 1..NOW 3 convolution::conv;
    ONNX "ConvInteger" 10..NOW 4 quantized_conv::conv_integer;
    ONNX "ConvTranspose" 1..NOW 3 transposed::conv_transpose;
    ONNX "Cos" 7..NOW 1 elementwise::unary;
    ONNX "Cosh" 9..NOW 1 elementwise::unary;
    ONNX "CumProd" 26..NOW 2 reduction::cumulative;
    ONNX "CumSum" 11..NOW 2 reduction::cumulative;
    ONNX "DFT" 17..NOW 3 spectral::dft;
    ONNX "DeformConv" 19..NOW 5 sampling::deform_conv;
    ONNX "DepthToSpace" 1..NOW 1 movement::depth_to_space;
    ONNX "DequantizeLinear" 10..NOW 3 quantized::dequantize_linear;
    ONNX "Det" 11..NOW 1 determinant::det;
    ONNX "Div" 6..NOW 2 elementwise::binary;
    ONNX "Dropout" 1..NOW 3 shape::dropout;
    ONNX "DynamicQuantizeLinear" 11..NOW 1 quantized::dynamic_quantize_linear;
    ONNX "Einsum" 12..NOW ANY contraction::einsum;
    ONNX "Elu" 6..NOW 1 activation::elu;
    ONNX "Equal" 1..NOW 2 elementwise::binary;
    ONNX "Erf" 9..NOW 1 elementwise::unary;
    ONNX "Exp" 6..NOW 1 elementwise::unary;
    ONNX "Expand" 8..NOW 2 shape::expand;
    ONNX "EyeLike" 9..NOW 1 constant::eye_like;
    ONNX "Flatten" 1..NOW 1 shape::flatten;
    ONNX "Floor" 6..NOW 1 elementwise::unary;
    ONNX "GRU" 3..NOW 6 recurrent::gru;
    ONNX "Gather" 1..NOW 2 index::gather;
    ONNX "GatherElements" 11..NOW 2 index::gather_elements;
    ONNX "GatherND" 11..NOW 2 index::gather_nd;
    ONNX "Gelu" 20..NOW 1 activation::gelu;
    ONNX "Gemm" 6..NOW 3 contraction::gemm;
    ONNX "GlobalAveragePool" 1..NOW 1 convolution::global_pool;
    ONNX "GlobalLpPool" 1..NOW 1 pooling::global_lp_pool;
    ONNX "GlobalMaxPool" 1..NOW 1 convolution::global_pool;
    ONNX "Greater" 1..NOW 2 elementwise::binary;
    ONNX "GreaterOrEqual" 12..NOW 2 elementwise::binary;
    ONNX "GridSample" 16..NOW 2 sampling::grid_sample;
    ONNX "GroupNormalization" 18..NOW 3 normalization::group_normalization;
    ONNX "HammingWindow" 17..NOW 1 spectral::window;
    ONNX "HannWindow" 17..NOW 1 spectral::window;
    ONNX "HardSigmoid" 6..NOW 1 activation::hard_sigmoid;
    ONNX "HardSwish" 14..NOW 1 activation::hard_swish;
    ONNX "Hardmax" 1..NOW 1 reduction::hardmax;
    ONNX "Identity" 1..NOW 1 shape::identity;
    ONNX "ImageScaler" 1..NOW 1 quantized_contrib::image_scaler;
    ONNX "InstanceNormalization" 6..NOW 3 normalization::instance_normalization;
    ONNX "IsInf" 10..NOW 1 elementwise::is_inf;
    ONNX "IsNaN" 9..NOW 1 elementwise::unary;
    ONNX "LRN" 1..NOW 1 pooling::local_response_normalization;
    ONNX "LSTM" 1..NOW 8 recurrent::lstm;
    ONNX "LayerNormalization" 1..NOW 3 normalization::layer_normalization;
    ONNX "LeakyRelu" 6..NOW 1 activation::leaky_relu;
    ONNX "Less" 1..NOW 2 elementwise::binary;
    ONNX "LessOrEqual" 12..NOW 2 elementwise::binary;
    ONNX "Log" 6..NOW 1 elementwise::unary;
    ONNX "LogSoftmax" 1..NOW 1 reduction::softmax;
    ONNX "LpNormalization" 1..NOW 1 normalization::lp_normalization;
    ONNX "LpPool" 1..NOW 1 pooling::lp_pool;
    ONNX "MatMul" 1..NOW 2 contraction::matmul;
    ONNX "MatMulInteger" 10..NOW 4 quantized::matmul_integer;
    ONNX "Max" 6..NOW ANY elementwise::variadic;
    ONNX "MaxPool" 1..NOW 1 convolution::max_pool;
    ONNX "MaxUnpool" 9..NOW 3 transposed::max_unpool;
    ONNX "Mean" 6..NOW ANY elementwise::mean;
    ONNX "MeanVarianceNormalization" 9..NOW 1 normalization::mean_variance_normalization;
    ONNX "MelWeightMatrix" 17..NOW 5 spectral::mel_weight_matrix;
    ONNX "Min" 6..NOW ANY elementwise::variadic;
    ONNX "Mish" 18..NOW 1 activation::mish;
    ONNX "Mod" 10..NOW 2 elementwise::modulo;
    ONNX "Mul" 6..NOW 2 elementwise::binary;
    ONNX "Neg" 6..NOW 1 elementwise::unary;
    ONNX "NegativeLogLikelihoodLoss" 12..NOW 3 losses::negative_log_likelihood;
    ONNX "Not" 1..NOW 1 elementwise::unary;
    ONNX "OneHot" 9..NOW 3 index::one_hot;
    ONNX "Or" 1..NOW 2 elementwise::binary;
    ONNX "PRelu" 6..NOW 2 activation::prelu;
    ONNX "Pad" 1..NOW 4 movement::pad;
    ONNX "Pow" 1..NOW 2 elementwise::pow;
    ONNX "QLinearConv" 10..NOW 9 quantized_conv::qlinear_conv;
    ONNX "QLinearMatMul" 10..NOW 8 quantized::qlinear_matmul;
    ONNX "QuantizeLinear" 10..NOW 3 quantized::quantize_linear;
    ONNX "RMSNormalization" 23..NOW 2 normalization::rms_normalization;
    ONNX "RNN" 1..NOW 6 recurrent::rnn;
    ONNX "Range" 11..NOW 3 constant::range;
    ONNX "Reciprocal" 6..NOW 1 elementwise::unary;
    ONNX "ReduceL1" 1..NOW 2 reduction::reduce;
    ONNX "ReduceL2" 1..NOW 2 reduction::reduce;
    ONNX "ReduceLogSum" 1..NOW 2 reduction::reduce;
    ONNX "ReduceLogSumExp" 1..NOW 2 reduction::reduce;
    ONNX "ReduceMax" 1..NOW 2 reduction::reduce;
    ONNX "ReduceMean" 1..NOW 2 reduction::reduce;
    ONNX "ReduceMin" 1..NOW 2 reduction::reduce;
    ONNX "ReduceProd" 1..NOW 2 reduction::reduce;
    ONNX "ReduceSum" 1..NOW 2 reduction::reduce;
    ONNX "ReduceSumSquare" 1..NOW 2 reduction::reduce;
    ONNX "Relu" 6..NOW 1 activation::relu;
    ONNX "Reshape" 1..NOW 2 shape::reshape;
    ONNX "Resize" 10..NOW 4 resize::resize;
    ONNX "ReverseSequence" 10..NOW 2 movement_data::reverse_sequence;
    ONNX "RoiAlign" 10..NOW 3 sampling::roi_align;
    ONNX "RotaryEmbedding" 23..NOW 4 rotary::rotary_embedding;
    ONNX "Round" 11..NOW 1 elementwise::unary;
    ONNX "STFT" 17..NOW 4 spectral::stft;
    ONNX "Scatter" 9..10 3 index::scatter_elements;
    ONNX "ScatterElements" 11..NOW 3 index::scatter_elements;
    ONNX "ScatterND" 11..NOW 3 index::scatter_nd;
    ONNX "Selu" 6..NOW 1 activation::selu;
    ONNX "Shape" 1..NOW 1 shape::shape;
    ONNX "Shrink" 9..NOW 1 activation::shrink;
    ONNX "Sigmoid" 6..NOW 1 elementwise::unary;
    ONNX "Sign" 9..NOW 1 elementwise::unary;
    ONNX "Sin" 7..NOW 1 elementwise::unary;
    ONNX "Sinh" 9..NOW 1 elementwise::unary;
    ONNX "Size" 1..NOW 1 shape::size;
    ONNX "Slice" 1..NOW 5 movement::slice;
    ONNX "Softmax" 1..NOW 1 reduction::softmax;
    ONNX "SoftmaxCrossEntropyLoss" 12..NOW 3 losses::softmax_cross_entropy;
    ONNX "Softplus" 1..NOW 1 activation::softplus;
    ONNX "Softsign" 1..NOW 1 activation::softsign;
    ONNX "SpaceToDepth" 1..NOW 1 movement::space_to_depth;
    ONNX "Split" 2..NOW 2 movement::split;
    ONNX "Sqrt" 6..NOW 1 elementwise::unary;
    ONNX "Squeeze" 1..NOW 2 shape::squeeze;
    ONNX "Sub" 6..NOW 2 elementwise::binary;
    ONNX "Sum" 6..NOW ANY elementwise::variadic;
    ONNX "Swish" 24..NOW 1 activation::swish;
    ONNX "Tan" 7..NOW 1 elementwise::unary;
    ONNX "Tanh" 6..NOW 1 elementwise::unary;
    ONNX "TensorScatter" 24..NOW 3 movement_data::tensor_scatter;
    ONNX "ThresholdedRelu" 10..NOW 1 activation::thresholded_relu;
    ONNX "Tile" 6..NOW 2 movement::tile;
    ONNX "TopK" 1..NOW 2 reduction::top_k;
    ONNX "Transpose" 1..NOW 1 movement::transpose;
    ONNX "Trilu" 14..NOW 2 index::trilu;
    ONNX "Unsqueeze" 1..NOW 2 shape::unsqueeze;
    ONNX "Upsample" 7..9 2 resize::upsample;
    ONNX "Where" 9..NOW 3 elementwise::select;
    ONNX "Xor" 1..NOW 2 elementwise::binary;

    // ONNX Runtime registers these in the default domain, and its exporters write them there.
    ONNX "SimplifiedLayerNormalization" 1..NOW 2 normalization::simplified_layer_normalization;
    ONNX "SkipLayerNormalization" 1..NOW 5 normalization::skip_layer_normalization;
    ONNX "SkipSimplifiedLayerNormalization" 1..NOW 4 normalization::skip_simplified_layer_normalization;

    PREVIEW "FlexAttention" 1..NOW 3 flex_attention::flex_attention;

    MICROSOFT "Attention" 1..NOW 7 contrib_attention::packed_attention;
    MICROSOFT "BiasGelu" 1..NOW 2 activation::bias_gelu;
    MICROSOFT "CDist" 1..NOW 2 reduction::pairwise_distance;
    MICROSOFT "CausalConvWithState" 1..NOW 4 convolution::causal_conv_with_state;
    MICROSOFT "DequantizeLinear" 1..NOW 3 quantized::dequantize_linear;
    MICROSOFT "DynamicQuantizeMatMul" 1..NOW 5 quantized_contrib::dynamic_quantize_matmul;
    MICROSOFT "EmbedLayerNormalization" 1..NOW 9 normalization::embed_layer_normalization;
    MICROSOFT "FastGelu" 1..NOW 2 activation::fast_gelu;
    MICROSOFT "FusedConv" 1..NOW 4 convolution::fused_conv;
    MICROSOFT "FusedGemm" 1..NOW 3 contraction::fused_gemm;
    MICROSOFT "FusedMatMul" 1..NOW 2 contraction::fused_matmul;
    MICROSOFT "GatherBlockQuantized" 1..NOW 4 packed_weights::gather_block_quantized;
    MICROSOFT "Gelu" 1..NOW 1 activation::erf_gelu;
    MICROSOFT "GroupQueryAttention" 1..NOW 16 grouped_query::group_query_attention;
    MICROSOFT "MatMulIntegerToFloat" 1..NOW 7 quantized_contrib::matmul_integer_to_float;
    MICROSOFT "MatMulNBits" 1..NOW 6 packed_weights::matmul_n_bits;
    MICROSOFT "MoE" 1..NOW 8 experts::moe;
    MICROSOFT "MultiHeadAttention" 1..NOW 10 contrib_attention::multi_head_attention;
    MICROSOFT "QAttention" 1..NOW 9 contrib_attention::quantized_attention;
    MICROSOFT "QGemm" 1..NOW 9 quantized_contrib::q_gemm;
    MICROSOFT "QLinearAdd" 1..NOW 8 quantized_contrib::qlinear_binary;
    MICROSOFT "QLinearAveragePool" 1..NOW 5 quantized_contrib::qlinear_unary;
    MICROSOFT "QLinearConcat" 1..NOW ANY quantized_contrib::qlinear_concat;
    MICROSOFT "QLinearGlobalAveragePool" 1..NOW 5 quantized_contrib::qlinear_unary;
    MICROSOFT "QLinearLeakyRelu" 1..NOW 5 quantized_contrib::qlinear_unary;
    MICROSOFT "QLinearMul" 1..NOW 8 quantized_contrib::qlinear_binary;
    MICROSOFT "QLinearSigmoid" 1..NOW 5 quantized_contrib::qlinear_unary;
    MICROSOFT "QLinearSoftmax" 1..NOW 5 quantized_contrib::qlinear_softmax;
    MICROSOFT "QLinearWhere" 1..NOW 9 quantized_contrib::qlinear_where;
    MICROSOFT "QMoE" 1..NOW 15 experts::quantized_moe;
    MICROSOFT "QuantizeLinear" 1..NOW 3 quantized::quantize_linear;
    MICROSOFT "QuickGelu" 1..NOW 1 activation::quick_gelu;
    MICROSOFT "RotaryEmbedding" 1..NOW 4 rotary::rotary_embedding_contrib;
    MICROSOFT "SimplifiedLayerNormalization" 1..NOW 2 normalization::simplified_layer_normalization;
    MICROSOFT "SkipLayerNormalization" 1..NOW 5 normalization::skip_layer_normalization;
    MICROSOFT "SkipSimplifiedLayerNormalization" 1..NOW 4 normalization::skip_simplified_layer_normalization;
    MICROSOFT "TransposeMatMul" 1..NOW 2 contraction::fused_matmul;
    MICROSOFT "Trilu" 1..NOW 2 index::trilu;
}

/// The rows of every operator, by domain and name.
static INDEX: LazyLock<HashMap<(&str, &str), Vec<&Row>>> = LazyLock::new(|| {
    let mut index: HashMap<(&str, &str), Vec<&Row>> = HashMap::new();
    for row in TABLE {
        index.entry((row.domain, row.op_type)).or_default().push(row);
    }
    index
});

/// The lowering of an operator.
pub(crate) fn find(domain: &str, op_type: &str, opset: i64) -> Result<&'static Row, Fault> {
    let Some(rows) = INDEX.get(&(domain, op_type)) else {
        return Err(Fault::unsupported(
            format!("the operator {} is not supported", quote(op_type)),
            "export the model without it, with another exporter or opset, or as a model-local function",
        ));
    };
    rows.iter().copied().find(|row| (row.from..=row.to).contains(&opset)).ok_or_else(|| {
        if domain == ONNX && opset < FIRST {
            return Fault::unsupported(
                format!("the operator {} of opset {opset} is not supported", quote(op_type)),
                "convert the model with `onnx.version_converter.convert_version(model, 17)`, or export it again",
            );
        }
        Fault::invalid(
            format!("the operator {} does not exist in this version of its domain", quote(op_type)),
            "the model's opset import is wrong; export it again",
        )
    })
}

/// The supported operators: domain, name, first version.
pub fn supported() -> impl Iterator<Item = (&'static str, &'static str, i64)> {
    TABLE.iter().map(|row| (row.domain, row.op_type, row.from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_one_operator_do_not_overlap() {
        for (i, a) in TABLE.iter().enumerate() {
            for b in &TABLE[i + 1..] {
                let same = (a.domain, a.op_type) == (b.domain, b.op_type);
                assert!(!same || a.to < b.from || b.to < a.from, "{}", a.op_type);
            }
        }
    }

    #[test]
    fn removed_and_unknown_operators_are_told_apart() {
        use crate::error::ErrorKind;
        assert_eq!(find("", "Scatter", 11).err().map(|fault| fault.kind), Some(ErrorKind::Invalid));
        assert_eq!(
            find("", "TfIdfVectorizer", 13).err().map(|fault| fault.kind),
            Some(ErrorKind::Unsupported)
        );
        assert!(find("", "MatMul", 13).is_ok());
        assert_eq!(find("", "Add", 1).err().map(|fault| fault.kind), Some(ErrorKind::Unsupported));
    }
}
