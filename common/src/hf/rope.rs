//! Rotary positions: their base and their scaling, in the place of today (`rope_parameters`) and in those of before
//! (`rope_theta` and `rope_scaling`).

use super::HfError;
use super::fields::Fields;
use crate::spec::RopeScaling;

/// What all families fall back on.
pub const DEFAULT_THETA: f32 = 10_000.0;

/// The base of the frequencies, and how they are stretched.
pub fn parse(f: &Fields) -> Result<(f32, Option<RopeScaling>), HfError> {
    f.only_number("partial_rotary_factor", 1.0)?;
    // Rotation of neighbours instead of halves.
    f.only_false("rope_interleaved")?;
    let theta = f.positive_or("rope_theta", DEFAULT_THETA)?;
    let (new, old) = (f.get("rope_parameters"), f.get("rope_scaling"));
    if new.is_some() && old.is_some() && new != old {
        return Err(f.invalid("rope_scaling", "what `rope_parameters` says, or null"));
    }
    let place = match new {
        Some(_) => "rope_parameters",
        None => "rope_scaling",
    };
    let Some(rope) = f.object(place)? else {
        return Ok((theta, None));
    };
    rope.only_number("partial_rotary_factor", 1.0)?;
    let theta = rope.positive_or("rope_theta", theta)?;
    let scaling = scaling(&rope)?;
    rope.refuse_unknown(|_| false)?;
    if let Some(fault) = scaling.and_then(|scaling| scaling.fault()) {
        return Err(f.invalid(place, format!("numbers that go together: {fault}")));
    }
    Ok((theta, scaling))
}

fn scaling(rope: &Fields) -> Result<Option<RopeScaling>, HfError> {
    // Configs of before say `type`; some say both.
    let (new, old) = (rope.get("rope_type"), rope.get("type"));
    let (field, kind) = match new {
        Some(kind) => ("rope_type", Some(kind)),
        None => ("type", old),
    };
    if new.is_some() && old.is_some() && new != old {
        return Err(rope.invalid("type", "what `rope_type` says"));
    }
    match kind.map(|kind| kind.as_str()) {
        None | Some(Some("default")) => Ok(None),
        Some(Some("linear")) => Ok(Some(RopeScaling::Linear {
            factor: rope.positive("factor")?,
        })),
        Some(Some("llama3")) => Ok(Some(RopeScaling::Llama3 {
            factor: rope.positive("factor")?,
            low_freq_factor: rope.positive("low_freq_factor")?,
            high_freq_factor: rope.positive("high_freq_factor")?,
            original_max_position_embeddings: rope.size(
                "original_max_position_embeddings",
                super::families::MAX_ROWS,
            )? as u32,
        })),
        Some(_) => Err(rope.unsupported(field, "\"default\", \"linear\" or \"llama3\"")),
    }
}
