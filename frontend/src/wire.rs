//! A walk over the protobuf wire format before anything is decoded.
//!
//! Decoding multiplies: two bytes of input can become a message of hundreds of bytes on the heap. This walk needs
//! constant memory and touches no weight; it refuses malformed input with the offset, and adds up what decoding would
//! allocate, so that the decoder proper only ever sees files that fit the limits and its own recursion bound.

use crate::error::Fault;
use crate::limits::Limits;
use crate::proto;
use std::mem::size_of;

/// Messages within messages. The decoder's own bound is 100, counted the same way; staying below it makes this the
/// place where deep files are refused, with a message that says what depth means in a model.
const MESSAGE_DEPTH: usize = 98;

/// What the walk found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stats {
    pub(crate) nodes: u64,
    /// An upper estimate of what decoding allocates.
    pub(crate) heap: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Model,
    OperatorSetId,
    StringStringEntry,
    Graph,
    Node,
    Attribute,
    Tensor,
    Segment,
    SparseTensor,
    ValueInfo,
    Type,
    TensorType,
    ElementType,
    MapType,
    OpaqueType,
    TensorShape,
    Dimension,
    Function,
    DeviceConfiguration,
    NodeDeviceConfiguration,
    ShardingSpec,
    IntIntListEntry,
    ShardedDim,
    SimpleShardedDim,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    /// Not read: skipped by the decoder without allocating.
    Ignored,
    Varint,
    Fixed32,
    Text,
    Texts,
    /// Bytes that stay in the map.
    Blob,
    Blobs,
    Message(Kind),
    /// Repeated numbers, packed or not, with the size of one in memory.
    Varints(u64),
    Fixed32s,
    Fixed64s,
}

impl Kind {
    fn size(self) -> usize {
        match self {
            Kind::Model => size_of::<proto::ModelProto>(),
            Kind::OperatorSetId => size_of::<proto::OperatorSetIdProto>(),
            Kind::StringStringEntry => size_of::<proto::StringStringEntryProto>(),
            Kind::Graph => size_of::<proto::GraphProto>(),
            Kind::Node => size_of::<proto::NodeProto>(),
            Kind::Attribute => size_of::<proto::AttributeProto>(),
            Kind::Tensor => size_of::<proto::TensorProto>(),
            Kind::Segment => size_of::<proto::SegmentProto>(),
            Kind::SparseTensor => size_of::<proto::SparseTensorProto>(),
            Kind::ValueInfo => size_of::<proto::ValueInfoProto>(),
            Kind::Type => size_of::<proto::TypeProto>(),
            Kind::TensorType => size_of::<proto::TensorTypeProto>(),
            Kind::ElementType => size_of::<proto::ElementTypeProto>(),
            Kind::MapType => size_of::<proto::MapTypeProto>(),
            Kind::OpaqueType => size_of::<proto::OpaqueTypeProto>(),
            Kind::TensorShape => size_of::<proto::TensorShapeProto>(),
            Kind::Dimension => size_of::<proto::DimensionProto>(),
            Kind::Function => size_of::<proto::FunctionProto>(),
            Kind::DeviceConfiguration => size_of::<proto::DeviceConfigurationProto>(),
            Kind::NodeDeviceConfiguration => size_of::<proto::NodeDeviceConfigurationProto>(),
            Kind::ShardingSpec => size_of::<proto::ShardingSpecProto>(),
            Kind::IntIntListEntry => size_of::<proto::IntIntListEntryProto>(),
            Kind::ShardedDim => size_of::<proto::ShardedDimProto>(),
            Kind::SimpleShardedDim => size_of::<proto::SimpleShardedDimProto>(),
        }
    }

    /// The field table; it mirrors `proto.rs`.
    fn field(self, number: u64) -> Field {
        use Field::{
            Blob, Blobs, Fixed32, Fixed32s, Fixed64s, Ignored, Message, Text, Texts, Varint, Varints,
        };
        match (self, number) {
            (Kind::Model, 1) => Varint,
            (Kind::Model, 2 | 3) => Text,
            (Kind::Model, 7) => Message(Kind::Graph),
            (Kind::Model, 8) => Message(Kind::OperatorSetId),
            (Kind::Model, 14) => Message(Kind::StringStringEntry),
            (Kind::Model, 25) => Message(Kind::Function),
            (Kind::Model, 26) => Message(Kind::DeviceConfiguration),
            (Kind::OperatorSetId, 1) => Text,
            (Kind::OperatorSetId, 2) => Varint,
            (Kind::StringStringEntry, 1 | 2) => Text,
            (Kind::Graph, 1) => Message(Kind::Node),
            (Kind::Graph, 2) => Text,
            (Kind::Graph, 5) => Message(Kind::Tensor),
            (Kind::Graph, 11..=13) => Message(Kind::ValueInfo),
            (Kind::Graph, 15) => Message(Kind::SparseTensor),
            (Kind::Graph, 16) => Message(Kind::StringStringEntry),
            (Kind::Node, 1 | 2) => Texts,
            (Kind::Node, 3 | 4 | 7 | 8) => Text,
            (Kind::Node, 5) => Message(Kind::Attribute),
            (Kind::Node, 9) => Message(Kind::StringStringEntry),
            (Kind::Node, 10) => Message(Kind::NodeDeviceConfiguration),
            (Kind::Attribute, 1 | 21) => Text,
            (Kind::Attribute, 2) => Fixed32,
            (Kind::Attribute, 3 | 20) => Varint,
            (Kind::Attribute, 4) => Blob,
            (Kind::Attribute, 5 | 10) => Message(Kind::Tensor),
            (Kind::Attribute, 6 | 11) => Message(Kind::Graph),
            (Kind::Attribute, 7) => Fixed32s,
            (Kind::Attribute, 8) => Varints(8),
            (Kind::Attribute, 9) => Blobs,
            (Kind::Attribute, 14 | 15) => Message(Kind::Type),
            (Kind::Attribute, 22 | 23) => Message(Kind::SparseTensor),
            (Kind::Tensor, 1) => Varints(8),
            (Kind::Tensor, 2 | 14) => Varint,
            (Kind::Tensor, 3) => Message(Kind::Segment),
            (Kind::Tensor, 4) => Fixed32s,
            (Kind::Tensor, 5) => Varints(4),
            (Kind::Tensor, 6) => Blobs,
            (Kind::Tensor, 7 | 11) => Varints(8),
            (Kind::Tensor, 8) => Text,
            (Kind::Tensor, 9) => Blob,
            (Kind::Tensor, 10) => Fixed64s,
            (Kind::Tensor, 13) => Message(Kind::StringStringEntry),
            (Kind::Segment, 1 | 2) => Varint,
            (Kind::SparseTensor, 1 | 2) => Message(Kind::Tensor),
            (Kind::SparseTensor, 3) => Varints(8),
            (Kind::ValueInfo, 1) => Text,
            (Kind::ValueInfo, 2) => Message(Kind::Type),
            (Kind::ValueInfo, 4) => Message(Kind::StringStringEntry),
            (Kind::Type, 1 | 8) => Message(Kind::TensorType),
            (Kind::Type, 4 | 9) => Message(Kind::ElementType),
            (Kind::Type, 5) => Message(Kind::MapType),
            (Kind::Type, 6) => Text,
            (Kind::Type, 7) => Message(Kind::OpaqueType),
            (Kind::TensorType, 1) => Varint,
            (Kind::TensorType, 2) => Message(Kind::TensorShape),
            (Kind::ElementType, 1) => Message(Kind::Type),
            (Kind::MapType, 1) => Varint,
            (Kind::MapType, 2) => Message(Kind::Type),
            (Kind::OpaqueType, 1 | 2) => Text,
            (Kind::TensorShape, 1) => Message(Kind::Dimension),
            (Kind::Dimension, 1) => Varint,
            (Kind::Dimension, 2) => Text,
            (Kind::Function, 1 | 10 | 13) => Text,
            (Kind::Function, 4..=6) => Texts,
            (Kind::Function, 7) => Message(Kind::Node),
            (Kind::Function, 9) => Message(Kind::OperatorSetId),
            (Kind::Function, 11) => Message(Kind::Attribute),
            (Kind::Function, 12) => Message(Kind::ValueInfo),
            (Kind::DeviceConfiguration, 1) => Text,
            (Kind::DeviceConfiguration, 2) => Varint,
            (Kind::DeviceConfiguration, 3) => Texts,
            (Kind::NodeDeviceConfiguration, 1) => Text,
            (Kind::NodeDeviceConfiguration, 2) => Message(Kind::ShardingSpec),
            (Kind::NodeDeviceConfiguration, 3) => Varint,
            (Kind::ShardingSpec, 1) => Text,
            (Kind::ShardingSpec, 2) => Varints(8),
            (Kind::ShardingSpec, 3) => Message(Kind::IntIntListEntry),
            (Kind::ShardingSpec, 4) => Message(Kind::ShardedDim),
            (Kind::IntIntListEntry, 1) => Varint,
            (Kind::IntIntListEntry, 2) => Varints(8),
            (Kind::ShardedDim, 1) => Varint,
            (Kind::ShardedDim, 2) => Message(Kind::SimpleShardedDim),
            (Kind::SimpleShardedDim, 1 | 3) => Varint,
            (Kind::SimpleShardedDim, 2) => Text,
            _ => Ignored,
        }
    }
}

/// Walks a whole model file.
///
/// # Errors
/// The first malformed place, or the first bound that is exceeded.
pub(crate) fn scan(content: &[u8], limits: &Limits) -> Result<Stats, Fault> {
    let budget = limits.heap(content.len() as u64);
    let mut cursor = Cursor { content, at: 0 };
    let mut stats = Stats::default();
    let mut open = vec![(Kind::Model, content.len())];
    while let Some(&(kind, end)) = open.last() {
        if cursor.at >= end {
            open.pop();
            continue;
        }
        let start = cursor.at;
        let tag = cursor.varint(end)?;
        let (field, wire) = (kind.field(tag >> 3), tag & 7);
        if tag >> 3 == 0 || tag > u64::from(u32::MAX) {
            return Err(malformed(start, format!("a field of {kind:?} has the number {}", tag >> 3)));
        }
        if !wire_fits(field, wire) {
            return Err(malformed(start, format!("field {} of {kind:?} has wire type {wire}", tag >> 3)));
        }
        match wire {
            0 => {
                cursor.varint(end)?;
                stats.add(if let Field::Varints(size) = field { 2 * size } else { 0 });
            }
            1 => {
                cursor.skip(8, end)?;
                stats.add(16);
            }
            5 => {
                cursor.skip(4, end)?;
                stats.add(8);
            }
            _ => {
                let len = cursor.varint(end)?;
                let remaining = (end - cursor.at) as u64;
                if len > remaining {
                    return Err(truncated(start, kind, tag >> 3, len, remaining));
                }
                if let Field::Message(child) = field {
                    stats.add(2 * child.size() as u64);
                    stats.nodes += u64::from(child == Kind::Node);
                    open.push((child, cursor.at + len as usize));
                    check_depth(open.len(), start)?;
                } else {
                    check_text(field, len, limits, start)?;
                    stats.add(payload_cost(field, len));
                    cursor.at += len as usize;
                }
            }
        }
        check_budget(&stats, budget, limits, start)?;
    }
    Ok(stats)
}

fn wire_fits(field: Field, wire: u64) -> bool {
    match field {
        Field::Ignored => matches!(wire, 0 | 1 | 2 | 5),
        Field::Varint => wire == 0,
        Field::Fixed32 => wire == 5,
        Field::Text | Field::Texts | Field::Blob | Field::Blobs | Field::Message(_) => wire == 2,
        Field::Varints(_) => matches!(wire, 0 | 2),
        Field::Fixed32s => matches!(wire, 5 | 2),
        Field::Fixed64s => matches!(wire, 1 | 2),
    }
}

/// Heap for a length-delimited field. Vectors grow by doubling, hence the factor two; a packed varint takes at least
/// one byte of input.
fn payload_cost(field: Field, len: u64) -> u64 {
    match field {
        Field::Text => len,
        Field::Texts => len.saturating_add(2 * size_of::<String>() as u64),
        Field::Blobs => 2 * size_of::<bytes::Bytes>() as u64,
        Field::Varints(size) => len.saturating_mul(2 * size),
        Field::Fixed32s | Field::Fixed64s => len.saturating_mul(2),
        Field::Ignored | Field::Varint | Field::Fixed32 | Field::Blob | Field::Message(_) => 0,
    }
}

fn check_text(field: Field, len: u64, limits: &Limits, start: usize) -> Result<(), Fault> {
    if matches!(field, Field::Text | Field::Texts) && len > limits.text {
        let message = format!("a name or text of {len} bytes; the limit is {}", limits.text);
        return Err(Fault::resource(message, "shorten the names in the model").at_byte(start as u64));
    }
    Ok(())
}

fn check_depth(depth: usize, start: usize) -> Result<(), Fault> {
    if depth <= MESSAGE_DEPTH {
        return Ok(());
    }
    Err(Fault::resource(
        format!("messages are nested more than {MESSAGE_DEPTH} deep (about 24 graphs within graphs)"),
        "flatten the nested If, Loop or Scan bodies",
    )
    .at_byte(start as u64))
}

fn check_budget(stats: &Stats, budget: u64, limits: &Limits, start: usize) -> Result<(), Fault> {
    if stats.nodes > limits.nodes {
        let message = format!("the model has more than {} nodes", limits.nodes);
        return Err(Fault::resource(
            message,
            "simplify the model, or allow more (--max-nodes) if you trust it",
        )
        .at_byte(start as u64));
    }
    if stats.heap > budget {
        let message = format!("decoding the model would take more than {} MiB of memory", budget >> 20);
        let help =
            "store weights as raw data or external data; a file that expands this much is hardly a model";
        return Err(Fault::resource(message, help).at_byte(start as u64));
    }
    Ok(())
}

fn malformed(at: usize, what: String) -> Fault {
    Fault::invalid(
        format!("this is not an ONNX model, or it is damaged: {what}"),
        "download or export the model again",
    )
    .at_byte(at as u64)
}

fn truncated(at: usize, kind: Kind, field: u64, len: u64, remaining: u64) -> Fault {
    Fault::invalid(
        format!(
            "the file is truncated or damaged: field {field} of {kind:?} claims {len} bytes, {remaining} are left"
        ),
        "download or export the model again; an interrupted download is the usual cause",
    )
    .at_byte(at as u64)
}

impl Stats {
    fn add(&mut self, heap: u64) {
        self.heap = self.heap.saturating_add(heap);
    }
}

struct Cursor<'a> {
    content: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn varint(&mut self, end: usize) -> Result<u64, Fault> {
        let start = self.at;
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = match self.content.get(self.at) {
                Some(&byte) if self.at < end => byte,
                _ => return Err(malformed(start, "a number is cut off".into())),
            };
            self.at += 1;
            if shift == 63 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(malformed(start, "a number is longer than 64 bits".into()))
    }

    fn skip(&mut self, len: usize, end: usize) -> Result<(), Fault> {
        if end - self.at < len {
            return Err(malformed(self.at, "a number is cut off".into()));
        }
        self.at += len;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn message(number: u32, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        prost::encoding::encode_key(number, prost::encoding::WireType::LengthDelimited, &mut out);
        prost::encoding::encode_varint(body.len() as u64, &mut out);
        out.extend_from_slice(body);
        out
    }

    fn fault(content: &[u8]) -> Fault {
        scan(content, &Limits::default()).unwrap_err()
    }

    #[test]
    fn counts_nodes_of_graphs_and_functions() {
        let node = message(1, &message(4, b"Relu"));
        let graph = message(7, &[node.clone(), node].concat());
        let function = message(25, &message(7, b""));
        let stats = scan(&[graph, function].concat(), &Limits::default()).unwrap();
        assert_eq!(stats.nodes, 3);
    }

    #[test]
    fn malformed_places_are_named() {
        assert!(fault(&[0x00]).message.contains("number 0"));
        assert!(fault(&[0x0e]).message.contains("wire type 6"));
        assert!(fault(&[0x08, 0xff]).message.contains("cut off"));
        assert!(fault(&[&[0x08][..], &[0xff; 10]].concat()).message.contains("longer than 64 bits"));
        assert!(fault(&[0x3a, 0x05, 0x0a]).message.contains("claims 5 bytes, 1 are left"));
        assert!(fault(&[0x38, 0x05]).message.contains("wire type 0"));
        assert_eq!(fault(&[0x08, 0x01, 0x0e]).site.byte, Some(2));
        // A length of 2^64 - 1 must not wrap.
        let huge = [&[0x3a][..], &[0xff; 9], &[0x01]].concat();
        assert!(fault(&huge).message.contains("claims 18446744073709551615 bytes"));
        // A child must not reach beyond its parent.
        assert!(
            fault(&[0x3a, 0x02, 0x0a, 0x05, 0, 0, 0, 0, 0]).message.contains("claims 5 bytes, 0 are left")
        );
    }

    #[test]
    fn depth_is_bounded_without_recursion() {
        // graph -> node -> attribute -> graph -> …, built from the inside out.
        let mut content = Vec::new();
        for _ in 0..5_000 {
            content = message(6, &message(1, &message(5, &content)));
        }
        let fault = fault(&message(7, &message(1, &message(5, &content))));
        assert_eq!(fault.kind, ErrorKind::Resource);
        assert!(fault.message.contains("nested"), "{fault}");
    }

    #[test]
    fn amplification_is_refused() {
        // Two bytes each, about a kilobyte when decoded.
        let attributes = [0x2a, 0x00].repeat(4 << 20);
        let fault = fault(&message(7, &message(1, &attributes)));
        assert_eq!(fault.kind, ErrorKind::Resource);
        assert!(fault.message.contains("memory"), "{fault}");
    }

    #[test]
    fn long_names_and_many_nodes_are_refused() {
        let limits = Limits { text: 10, nodes: 3, ..Limits::default() };
        let named = message(7, &message(1, &message(4, &[b'x'; 11])));
        assert!(scan(&named, &limits).unwrap_err().message.contains("11 bytes"));
        let many = message(7, &[0x0a, 0x00].repeat(4));
        assert!(scan(&many, &limits).unwrap_err().message.contains("more than 3 nodes"));
    }
}
