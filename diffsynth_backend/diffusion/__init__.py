"""Diffusion: schedules, units and the base of all pipelines."""
from .base_pipeline import BasePipeline, PipelineUnit, PipelineUnitRunner, Step
from .flow_match import FlowMatchScheduler

__all__ = ["BasePipeline", "FlowMatchScheduler", "PipelineUnit", "PipelineUnitRunner", "Step"]
