//! The safetensors format, by hand: a u64 header length, a JSON header, the data. Written by hand because our header is
//! known before the data is, and because a reader of foreign files must not allocate what a header merely claims.
//! **Pure**: bytes in, bytes out. (<https://huggingface.co/docs/safetensors>)

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

/// Longest header that is read, in bytes; the same bound as in the `safetensors` crate.
pub const MAX_HEADER: u64 = 100_000_000;

/// A tensor as a header describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Element type, such as `F32`.
    pub dtype: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// First byte, counted from the end of the header.
    pub begin: u64,
    /// One past the last byte.
    pub end: u64,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The first bytes of a safetensors file of f32 tensors that lie in the given order: length and header, padded so that
/// the data is aligned to 8 bytes.
pub fn header<'a>(tensors: impl IntoIterator<Item = (String, &'a [usize])>) -> Vec<u8> {
    let mut fields = vec!["\"__metadata__\":{\"format\":\"pt\"}".to_owned()];
    let mut begin = 0u64;
    for (name, shape) in tensors {
        let end = begin + 4 * shape.iter().map(|d| *d as u64).product::<u64>();
        let info = json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]});
        fields.push(format!("{}:{info}", Value::String(name)));
        begin = end;
    }
    let mut json = format!("{{{}}}", fields.join(",")).into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json);
    bytes
}

/// Reads the length of a header of a file of `file_bytes` bytes, so that the header can be allocated.
pub fn header_len(prefix: [u8; 8], file_bytes: u64) -> Result<usize, String> {
    let len = u64::from_le_bytes(prefix);
    match len <= MAX_HEADER.min(file_bytes.saturating_sub(8)) {
        true => Ok(len as usize),
        false => Err(format!(
            "its header claims {len} bytes in a file of {file_bytes}: it was cut, or is no safetensors file"
        )),
    }
}

/// Reads a header, without its length, of a file with `data_bytes` bytes after it. Tensors come in the order of
/// their bytes, and tile the data without gap or overlap.
pub fn parse_header(header: &[u8], data_bytes: u64) -> Result<Vec<TensorInfo>, String> {
    #[derive(Deserialize)]
    struct Raw {
        dtype: String,
        shape: Vec<usize>,
        data_offsets: (u64, u64),
    }
    let fields: BTreeMap<String, Value> =
        serde_json::from_slice(header).map_err(|e| format!("its header is not valid JSON: {e}"))?;
    let mut tensors = Vec::new();
    for (name, value) in fields
        .into_iter()
        .filter(|(name, _)| name != "__metadata__")
    {
        let raw: Raw =
            serde_json::from_value(value).map_err(|e| format!("tensor `{name}`: {e}"))?;
        let (begin, end) = raw.data_offsets;
        let info = TensorInfo {
            name,
            dtype: raw.dtype,
            shape: raw.shape,
            begin,
            end,
        };
        check_size(&info)?;
        tensors.push(info);
    }
    tensors.sort_by_key(|t| (t.begin, t.end));
    let mut expected = 0;
    for tensor in &tensors {
        if tensor.begin != expected {
            return Err(format!(
                "tensor `{}` begins at byte {} of the data, expected {expected}",
                tensor.name, tensor.begin
            ));
        }
        expected = tensor.end;
    }
    match expected == data_bytes {
        true => Ok(tensors),
        false => Err(format!(
            "its tensors take {expected} bytes, but {data_bytes} follow the header: it was cut or extended"
        )),
    }
}

/// Reads the header of a file that is in memory.
///
/// # Errors
/// What is no safetensors file, or does not hold together.
pub fn header_of(content: &[u8]) -> Result<Vec<TensorInfo>, String> {
    let prefix = content.first_chunk();
    let prefix = prefix.ok_or("it has fewer than 8 bytes, so it is no safetensors file")?;
    let bytes = content.len() as u64;
    let len = header_len(*prefix, bytes)?;
    parse_header(&content[8..8 + len], bytes - 8 - len as u64)
}

fn check_size(tensor: &TensorInfo) -> Result<(), String> {
    let name = &tensor.name;
    let size = element_bytes(&tensor.dtype)
        .ok_or_else(|| format!("tensor `{name}` has the unknown type `{}`", tensor.dtype))?;
    let bytes = tensor
        .shape
        .iter()
        .try_fold(size, |product, d| product.checked_mul(*d as u64));
    match (bytes, tensor.end.checked_sub(tensor.begin)) {
        (Some(a), Some(b)) if a == b => Ok(()),
        _ => Err(format!(
            "tensor `{name}` of shape {:?} and type {} does not fill bytes {} to {}",
            tensor.shape, tensor.dtype, tensor.begin, tensor.end
        )),
    }
}

fn element_bytes(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F64" | "I64" | "U64" => 8,
        "F32" | "I32" | "U32" => 4,
        "F16" | "BF16" | "I16" | "U16" => 2,
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" => 1,
        _ => return None,
    })
}

/// Converts the bytes of elements of type `dtype` to f32. `None` for a type that is not converted.
///
/// # Panics
/// If `bytes` does not hold exactly `out.len()` elements.
pub fn convert(dtype: &str, bytes: &[u8], out: &mut [f32]) -> Option<()> {
    match dtype {
        "F32" => bytemuck::cast_slice_mut(out).copy_from_slice(bytes),
        "F16" => convert_halves(bytes, out, |bits| half::f16::from_bits(bits).to_f32()),
        "BF16" => convert_halves(bytes, out, |bits| half::bf16::from_bits(bits).to_f32()),
        _ => return None,
    }
    Some(())
}

fn convert_halves(bytes: &[u8], out: &mut [f32], to_f32: impl Fn(u16) -> f32) {
    assert_eq!(bytes.len(), 2 * out.len());
    for (value, bytes) in out.iter_mut().zip(bytes.chunks_exact(2)) {
        *value = to_f32(u16::from_le_bytes([bytes[0], bytes[1]]));
    }
}

/// Bytes of one element of a type that [`convert`] takes.
pub fn convertible_bytes(dtype: &str) -> Option<usize> {
    match dtype {
        "F32" => Some(4),
        "F16" | "BF16" => Some(2),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_header_is_read_back_and_aligned() {
        let shapes: [(&str, &[usize]); 3] = [("z", &[2, 3]), ("a\"b", &[5]), ("m", &[1])];
        let bytes = header(shapes.iter().map(|(n, s)| (n.to_string(), *s)));
        assert!(bytes.len().is_multiple_of(8));
        let len = header_len(bytes[..8].try_into().unwrap(), bytes.len() as u64 + 48).unwrap();
        assert_eq!(len, bytes.len() - 8);
        let tensors = parse_header(&bytes[8..], 48).unwrap();
        let names: Vec<_> = tensors.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["z", "a\"b", "m"]);
        assert_eq!((tensors[1].begin, tensors[1].end), (24, 44));
    }

    #[test]
    fn absurd_lengths_are_refused() {
        for (len, file) in [
            (u64::MAX, 1000),
            (993, 1000),
            (MAX_HEADER + 1, u64::MAX),
            (1, 0),
        ] {
            assert!(header_len(len.to_le_bytes(), file).is_err());
        }
    }

    #[test]
    fn contradictory_headers_are_refused() {
        let one = |dtype: &str, shape: &str, offsets: &str| {
            format!(
                r#"{{"t": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}"#
            )
        };
        let max = format!("[{}, 8]", usize::MAX);
        for (header, data) in [
            (one("F32", "[2]", "[0, 8]"), 9),
            (one("F32", "[2]", "[4, 12]"), 12),
            (one("F32", "[2]", "[8, 0]"), 8),
            (one("F32", "[3]", "[0, 8]"), 8),
            (one("Q4", "[2]", "[0, 8]"), 8),
            (one("F32", &max, "[0, 8]"), 8),
            ("[]".into(), 0),
        ] {
            assert!(parse_header(header.as_bytes(), data).is_err(), "{header}");
        }
    }

    #[test]
    fn half_precision_is_widened() {
        let mut out = [0f32; 3];
        let f16: Vec<u8> = [0x3c00u16, 0xc000, 0x0001]
            .iter()
            .flat_map(|b| b.to_le_bytes())
            .collect();
        convert("F16", &f16, &mut out).unwrap();
        assert_eq!(out, [1.0, -2.0, 5.960_464_5e-8]);
        let bf16: Vec<u8> = [0x3f80u16, 0xc000, 0x4049]
            .iter()
            .flat_map(|b| b.to_le_bytes())
            .collect();
        convert("BF16", &bf16, &mut out).unwrap();
        assert_eq!(out, [1.0, -2.0, 3.140625]);
    }

    proptest! {
        #[test]
        fn random_headers_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), data: u64) {
            let _ = parse_header(&bytes, data);
            if let Some(prefix) = bytes.first_chunk() {
                let _ = header_len(*prefix, data);
            }
        }
    }
}
