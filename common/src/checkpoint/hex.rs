//! Hashes as people and JSON see them: 64 lower-case hexadecimal digits. **Pure.**

use serde::{Deserialize, Deserializer, Serializer, de::Error};

/// 64 lower-case hexadecimal digits.
pub fn encode(hash: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*hash).to_hex().to_string()
}

/// Reads what [`encode`] wrote; `None` if `text` is anything else.
pub fn decode(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || text.bytes().any(|b| b.is_ascii_uppercase()) {
        return None;
    }
    blake3::Hash::from_hex(text).ok().map(Into::into)
}

/// For `#[serde(with = "...")]` on a `[u8; 32]`.
pub fn serialize<S: Serializer>(hash: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&encode(hash))
}

/// For `#[serde(with = "...")]` on a `[u8; 32]`.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
    let text = String::deserialize(deserializer)?;
    decode(&text)
        .ok_or_else(|| D::Error::custom(format!("`{text}` is not a hash of 64 hex digits")))
}

/// For `#[serde(with = "...")]` on an `Option<[u8; 32]>`.
pub mod option {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// `null` or the digits.
    pub fn serialize<S: Serializer>(
        hash: &Option<[u8; 32]>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match hash {
            Some(hash) => serializer.serialize_some(&super::encode(hash)),
            None => serializer.serialize_none(),
        }
    }

    /// `null` or the digits.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<[u8; 32]>, D::Error> {
        let Some(text) = Option::<String>::deserialize(deserializer)? else {
            return Ok(None);
        };
        super::decode(&text)
            .map(Some)
            .ok_or_else(|| D::Error::custom(format!("`{text}` is not a hash of 64 hex digits")))
    }
}
