//! Where a request stands in a trace, from process to process.
//!
//! Between processes that is one string, the `traceparent` of W3C Trace Context level 1 (section 3.2): the router takes it from the
//! client's header, makes its own span a child of it, and hands the span's own `traceparent` to the workers, which do the
//! same. Without export there are no trace ids; then what came in should be passed on as it is:
//! `telemetry::traceparent(&span).or(header)`.

use opentelemetry::{
    Context, SpanId, TraceFlags, TraceId,
    trace::{SpanContext, TraceContextExt, TraceState},
};
use std::{fmt, str::FromStr};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// A span of some process, as a `traceparent` header says it: `00-<trace id>-<span id>-<flags>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    /// Names the trace; not zero.
    pub trace_id: u128,
    /// Names the span; not zero.
    pub span_id: u64,
    /// The caller records this trace.
    pub sampled: bool,
}

/// The string is no `traceparent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a traceparent")]
pub struct NotATraceParent;

impl FromStr for TraceParent {
    type Err = NotATraceParent;

    fn from_str(header: &str) -> Result<Self, NotATraceParent> {
        let mut fields = header.splitn(5, '-');
        let mut field = |digits: usize| fields.next().and_then(|text| hex(text, digits)).ok_or(NotATraceParent);
        let version = field(2)?;
        let trace_id = field(32)?;
        let span_id = field(16)?;
        let flags = field(2)?;
        // A later version may say more, behind another dash; 255 is none.
        let ends_right = fields.next().is_none() || version > 0;
        if version == 0xff || trace_id == 0 || span_id == 0 || !ends_right {
            return Err(NotATraceParent);
        }
        let span_id = u64::try_from(span_id).map_err(|_| NotATraceParent)?;
        Ok(Self { trace_id, span_id, sampled: flags & 1 == 1 })
    }
}

/// Reads so many lower-case hexadecimal digits and nothing else.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let lower_case = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if text.len() == digits && lower_case { u128::from_str_radix(text, 16).ok() } else { None }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace_id, self.span_id, u8::from(self.sampled))
    }
}

impl TraceParent {
    fn span_context(self) -> SpanContext {
        let flags = if self.sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
        let (trace_id, span_id) = (TraceId::from(self.trace_id), SpanId::from(self.span_id));
        SpanContext::new(trace_id, span_id, flags, true, TraceState::default())
    }
}

/// Makes `span` a child of the span that `traceparent` names. A string that is none is ignored, as the standard asks, and so is
/// all without export. To be called before the span is entered.
pub fn set_parent(span: &Span, traceparent: &str) {
    if let Ok(parent) = traceparent.parse::<TraceParent>() {
        let context = Context::new().with_remote_span_context(parent.span_context());
        if let Err(error) = span.set_parent(context) {
            tracing::trace!("the span is not part of a trace: {error}");
        }
    }
}

/// Returns the `traceparent` that names `span`; `None` without export.
pub fn traceparent(span: &Span) -> Option<String> {
    let context = span.context();
    let context = context.span().span_context().clone();
    context.is_valid().then(|| {
        let trace_id = u128::from_be_bytes(context.trace_id().to_bytes());
        let span_id = u64::from_be_bytes(context.span_id().to_bytes());
        TraceParent { trace_id, span_id, sampled: context.is_sampled() }.to_string()
    })
}

/// Returns the `traceparent` that names the current span; `None` without export or outside spans.
pub fn current_traceparent() -> Option<String> {
    traceparent(&Span::current())
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn the_standard_example_reads_and_writes() {
        let parent: TraceParent = EXAMPLE.parse().expect("the example of the standard");
        let expected =
            TraceParent { trace_id: 0x4bf92f3577b34da6a3ce929d0e0e4736, span_id: 0x00f067aa0ba902b7, sampled: true };
        assert_eq!(parent, expected);
        assert_eq!(parent.to_string(), EXAMPLE);
    }

    #[test]
    fn what_is_and_what_is_not_a_traceparent() {
        fn check(header: &str, good: bool) {
            assert_eq!(header.parse::<TraceParent>().is_ok(), good, "{header}");
        }
        let ids = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7";
        check(&format!("00-{ids}-00"), true);
        check(&format!("00-{ids}-ff"), true);
        check(&format!("01-{ids}-01"), true);
        check(&format!("01-{ids}-01-what-the-future-brings"), true);
        check(&format!("00-{ids}-01-more"), false);
        check(&format!("00-{ids}-01-"), false);
        check(&format!("ff-{ids}-01"), false);
        check(&format!("0-{ids}-01"), false);
        check(&format!("00-{ids}"), false);
        check(&format!("00-{ids}-1"), false);
        check(&format!("00-{ids}-+1"), false);
        check(&format!("00-{}-01", ids.to_uppercase()), false);
        check("00-00000000000000000000000000000000-00f067aa0ba902b7-01", false);
        check("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", false);
        check("", false);
        check("größe-und-mehr-und-mehr", false);
    }

    #[test]
    fn without_export_there_is_no_traceparent() {
        let span = tracing::info_span!("request");
        set_parent(&span, EXAMPLE);
        set_parent(&span, "nonsense");
        assert_eq!(traceparent(&span), None);
        assert_eq!(current_traceparent(), None);
    }
}
