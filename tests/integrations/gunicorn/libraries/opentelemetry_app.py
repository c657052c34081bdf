"""An application as OpenTelemetry's own guide sets it up: traces and metrics, which threads export."""

from __future__ import annotations

import encodings.idna  # noqa: F401 - the user of the requests may be unable to read the interpreter's files
import os

from flask import Flask
from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

COLLECTOR = os.environ["TEST_COLLECTOR"]

provider = TracerProvider()
provider.add_span_processor(
    BatchSpanProcessor(OTLPSpanExporter(f"{COLLECTOR}/v1/traces"), schedule_delay_millis=200)
)
trace.set_tracer_provider(provider)
reader = PeriodicExportingMetricReader(
    OTLPMetricExporter(f"{COLLECTOR}/v1/metrics"), export_interval_millis=200
)
metrics.set_meter_provider(MeterProvider([reader]))
requests = metrics.get_meter(__name__).create_counter("requests")

app = Flask(__name__)


@app.get("/free/who")
def who() -> str:
    requests.add(1, {"pid": os.getpid()})
    with trace.get_tracer(__name__).start_as_current_span(f"request in {os.getpid()}"):
        return f"{os.getpid()} {os.getuid()}"
