"""Jobs for schedulers, as text: nothing here submits one."""
