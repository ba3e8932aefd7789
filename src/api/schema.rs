//! Schemas of scalars, for fields whose Rust type says too little or too much: Kubernetes knows no unsigned formats, and what an object may
//! hold is narrower than its type.
//!
//! In: a field's `schema_with`. Out: its part of the CRD.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::json;

use super::scalar::Duration;

/// A count: Kubernetes knows no unsigned formats.
pub(super) fn count(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "integer", "format": "int64", "minimum": 0 })
}

/// As [`count`], may be absent.
pub(super) fn optional_count(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "integer", "format": "int64", "minimum": 0, "nullable": true })
}

/// A finite number that is not negative.
pub(super) fn amount(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "number", "format": "double", "minimum": 0.0 })
}

/// A finite number that is not negative, may be absent.
pub(super) fn optional_amount(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "number", "format": "double", "minimum": 0.0, "nullable": true })
}

/// A probability.
pub(super) fn probability(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "number", "format": "double", "minimum": 0.0, "maximum": 1.0 })
}

/// As [`probability`], may be absent.
pub(super) fn optional_probability(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "number", "format": "double", "minimum": 0.0, "maximum": 1.0, "nullable": true })
}

/// An instant, may be absent.
pub(super) fn optional_time(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "format": "date-time", "nullable": true })
}

/// A share in whole percent, may be absent.
pub(super) fn optional_percentage(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "integer", "format": "int64", "minimum": 0, "maximum": 100, "nullable": true })
}

/// A number of multifd channels (QEMU's `multifd-channels`, a byte), may be absent.
pub(super) fn optional_channels(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "integer", "format": "int64", "minimum": 1, "maximum": 255, "nullable": true })
}

/// KubeVirt's `completionTimeoutPerGiB`, up to a day, may be absent.
pub(super) fn optional_per_gigabyte(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "integer", "format": "int64", "minimum": 1, "maximum": 86_400, "nullable": true })
}

/// How many at once.
pub(super) fn parallel(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "integer", "format": "int64", "minimum": 1, "maximum": 16 })
}

/// As [`parallel`], may be absent.
pub(super) fn optional_parallel(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "integer", "format": "int64", "minimum": 1, "maximum": 16, "nullable": true })
}

/// A bandwidth, may be absent.
pub(super) fn optional_rate(_: &mut SchemaGenerator) -> Schema {
    quantity(
        "quantity(string(self)).compareTo(quantity('64Ki')) >= 0 && quantity(string(self)).compareTo(quantity('1Ti')) <= 0",
        "it has to be between 64Ki and 1Ti bytes per second, such as 100Mi",
    )
}

/// An amount of memory or of processors that is more than none, may be absent.
pub(super) fn optional_positive(_: &mut SchemaGenerator) -> Schema {
    quantity(
        "quantity(string(self)).compareTo(quantity('0')) > 0",
        "it has to be more than 0, such as 8Gi of memory or 4 processors",
    )
}

/// A quantity under a rule.
fn quantity(rule: &str, message: &str) -> Schema {
    let rule = format!("isQuantity(string(self)) && {rule}");
    json_schema!({
        "x-kubernetes-int-or-string": true,
        "x-kubernetes-validations": [{ "rule": rule, "message": message }],
    })
}

/// How long something may run, 1s to 24h, may be absent.
pub(super) fn optional_deadline(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = deadline(generator);
    schema.insert("nullable".to_owned(), true.into());
    schema
}

/// How long something may run, 1s to 24h.
pub(super) fn deadline(generator: &mut SchemaGenerator) -> Schema {
    between(generator, "1s", "24h", "10m")
}

/// How long a migration may be held: KubeVirt's pending timeout of 900 s, less two minutes.
pub(super) fn hold_duration(generator: &mut SchemaGenerator) -> Schema {
    between(generator, "1s", "780s", "5m")
}

/// How long an override may last.
pub(super) fn override_duration(generator: &mut SchemaGenerator) -> Schema {
    between(generator, "1s", "168h", "1h")
}

/// A duration within limits. The rule comes after the pattern, which alone would let `0` pass.
fn between(generator: &mut SchemaGenerator, least: &str, most: &str, such_as: &str) -> Schema {
    let mut schema = Duration::json_schema(generator);
    let rule = json!([{
        "rule": format!("duration(self) >= duration('{least}') && duration(self) <= duration('{most}')"),
        "message": format!("it has to be between {least} and {most}, such as {such_as}"),
    }]);
    schema.insert("x-kubernetes-validations".to_owned(), rule);
    schema
}

/// A verdict.
pub(super) fn verdict(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "enum": ["Converges", "Borderline", "Fails", "Unknown"] })
}

/// A verdict, may be absent.
pub(super) fn optional_verdict(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "enum": ["Converges", "Borderline", "Fails", "Unknown"], "nullable": true })
}

/// A method, may be absent.
pub(super) fn optional_method(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "enum": ["PC", "DR"], "nullable": true })
}

/// Kubernetes' conditions, mergeable by type.
pub(super) fn conditions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status", "lastTransitionTime", "reason", "message"],
            "properties": {
                "type": { "type": "string", "maxLength": 316 },
                "status": { "type": "string", "enum": ["True", "False", "Unknown"] },
                "lastTransitionTime": { "type": "string", "format": "date-time" },
                "reason": { "type": "string", "maxLength": 1024 },
                "message": { "type": "string", "maxLength": 32768 },
                "observedGeneration": { "type": "integer", "format": "int64", "minimum": 0 }
            }
        }
    })
}
